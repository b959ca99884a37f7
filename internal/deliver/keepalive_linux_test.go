package deliver

import (
	"context"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Every connection that a call uses comes from dial, with TLS or without. Clouds drop those
// that carry nothing for some minutes.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	d := newDeliverer(t)
	conn, err := d.dial(context.Background(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	option := func(level, name int) (value int) {
		if err := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) }); err != nil {
			t.Fatal(err)
		}
		return value
	}
	if option(unix.SOL_SOCKET, unix.SO_KEEPALIVE) == 0 {
		t.Error("keep-alive is off")
	}
	idle := time.Duration(option(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)) * time.Second
	interval := time.Duration(option(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)) * time.Second
	count := option(unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
	if idle < time.Second || idle >= time.Minute || interval < time.Second || interval >= time.Minute {
		t.Errorf("the first probe comes after %v and others every %v, want less than a minute", idle, interval)
	}
	if gone := idle + time.Duration(count)*interval; gone < time.Minute || gone > 5*time.Minute {
		t.Errorf("a target that is gone is noticed after %v", gone)
	}
}
