package cli

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// faultVariable names a fault for tests of whole runs: KIND@STEP, where KIND is
// error, interrupt or kill. It happens when the step is done.
const faultVariable = "SITE_TEST_FAULT"

// injectedFault is nil without a fault.
func injectedFault(text string) func(context.Context, string) error {
	kind, step, ok := strings.Cut(text, "@")
	if !ok {
		return nil
	}
	return func(ctx context.Context, done string) error {
		if done != step {
			return nil
		}
		var err error
		switch kind {
		case "interrupt":
			if err = syscall.Kill(os.Getpid(), syscall.SIGINT); err == nil {
				<-ctx.Done()
				return context.Cause(ctx)
			}
		case "kill":
			if err = syscall.Kill(os.Getpid(), syscall.SIGKILL); err == nil {
				select {} // it ends here
			}
		}
		if err != nil {
			return err
		}
		return fmt.Errorf("a fault was injected behind %q", step)
	}
}
