package postgres

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// isRowError reports whether err may be the fault of one row of a statement:
// data exceptions (class 22), broken constraints (23) and exceeded limits (54).
func isRowError(err error) bool {
	switch errorClass(err) {
	case "22", "23", "54":
		return true
	}
	return false
}

// errorClass returns the class of the SQLSTATE that the server answered with,
// its first two characters, or "" where err is not the server's.
func errorClass(err error) string {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return ""
	}
	return pgErr.Code[:min(2, len(pgErr.Code))]
}

// classify wraps err in [task.ErrUnavailable] where the database is away, but
// not where it found fault with the statement or the mistake is our own.
func classify(err error) error {
	if err == nil || errors.Is(err, task.ErrUnavailable) {
		return err
	}
	// A server that refuses to let us in says why in many classes: a password
	// that is being rotated, a database that is being renamed.
	var connecting *pgconn.ConnectError
	if errors.As(err, &connecting) {
		return fmt.Errorf("%w: %w", task.ErrUnavailable, err)
	}
	switch errorClass(err) {
	case "08", // connection exception
		"25", // read-only transaction, among others
		"40", // serialization failure, deadlock
		"53", // out of disk, memory or connections
		"55", // lock not available
		"57", // shutting down, starting up, statement timeout
		"58", // I/O error
		"XX": // internal error
		return fmt.Errorf("%w: %w", task.ErrUnavailable, err)
	case "":
		if isSilence(err) {
			return fmt.Errorf("%w: %w", task.ErrUnavailable, err)
		}
	}
	return err
}

// isSilence reports that no answer came: in time, over a connection that held.
// What is left without the server's word on it is our own mistake, like a value
// that cannot be encoded or read.
func isSilence(err error) bool {
	var network net.Error
	for _, sign := range []error{
		context.Canceled, context.DeadlineExceeded, io.EOF, io.ErrUnexpectedEOF,
		pgconn.ErrConnClosed, driver.ErrBadConn, batch.ErrClosed,
	} {
		if errors.Is(err, sign) {
			return true
		}
	}
	return errors.As(err, &network)
}
