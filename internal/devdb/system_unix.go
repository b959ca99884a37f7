//go:build unix

package devdb

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
)

// tryLock locks f for this open file and those that inherit it, and reports
// whether it could: not while another process holds the lock.
func tryLock(f *os.File) (bool, error) {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// isolate has cmd run in a process group of its own, so that Ctrl-C in the
// terminal leaves it to us, and as another user when we are root.
func isolate(cmd *exec.Cmd, as account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(as.uid), Gid: uint32(as.gid)}
	}
}

// killGroup kills an isolated process and its children.
func killGroup(p *os.Process) { _ = syscall.Kill(-p.Pid, syscall.SIGKILL) }

func ownerOf(info fs.FileInfo) account {
	stat := info.Sys().(*syscall.Stat_t)
	return account{int(stat.Uid), int(stat.Gid)}
}
