package devdb

import (
	"os/exec"
	"syscall"
)

// dieWithParent has the kernel stop an isolated cmd when the thread that starts
// it ends, and so when our process is killed.
func dieWithParent(cmd *exec.Cmd) { cmd.SysProcAttr.Pdeathsig = syscall.SIGINT }
