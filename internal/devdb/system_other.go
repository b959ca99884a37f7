//go:build !linux

package devdb

import "os/exec"

// dieWithParent does nothing here: what a killed process leaves running, the
// next start in the same folder stops.
func dieWithParent(*exec.Cmd) {}
