// containerd's own snapshotter test suite against a running accel-snapshotter, one
// per test, over its socket. Built and run by tests/containerd-suite/run.
package suite

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

func start(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(filepath.Dir(root), "socket")
	log, err := os.Create(filepath.Join(filepath.Dir(root), "log"))
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	server := exec.Command(os.Getenv("ACCEL_SNAPSHOTTER"), "serve", "--root", root,
		"--socket", socket, "--server", filepath.Join(filepath.Dir(root), "no-server"))
	server.Stdout, server.Stderr = log, log
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() error {
		_ = server.Process.Signal(syscall.SIGTERM)
		if err := server.Wait(); err != nil {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("the snapshotter ended with %w: %s", err, text)
		}
		return nil
	}
	dialing, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	connection, err := grpc.DialContext(dialing, dialer.DialAddress(socket), grpc.WithBlock(),
		grpc.WithInsecure(), grpc.WithContextDialer(dialer.ContextDialer))
	if err != nil {
		_ = stop()
		return nil, nil, err
	}
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "accel")
	return snapshotter, func() error {
		// What is removed is gone only after this.
		if err := snapshotter.(snapshots.Cleaner).Cleanup(ctx); err != nil {
			return err
		}
		if err := connection.Close(); err != nil {
			return err
		}
		return stop()
	}, nil
}

func TestSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "accel", start)
}
