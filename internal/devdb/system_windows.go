package devdb

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
)

// On Windows the package only compiles: claiming a folder fails.

func tryLock(*os.File) (bool, error) {
	return false, fmt.Errorf("a private PostgreSQL needs Unix: %w", errors.ErrUnsupported)
}

func isolate(*exec.Cmd, account)  {}
func killGroup(*os.Process)       {}
func ownerOf(fs.FileInfo) account { return account{} }
