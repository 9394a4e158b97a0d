//go:build !linux

package blob

import "errors"

func mountSmall(string) error { return errors.ErrUnsupported }
func growSmall(string) error  { return errors.ErrUnsupported }
