package command

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

// maxFile bounds the files: they hold a few keys.
const maxFile = 1 << 20

func fileCommand(options Options) *cobra.Command {
	command := &cobra.Command{Use: "file", Short: "The host's copy of the sealed init file, and its unseal key"}
	get := &cobra.Command{
		Use: "get PATH", Short: "Print the file as it is", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, arguments []string) error {
			if err := options.allowed(arguments[0]); err != nil {
				return err
			}
			content, err := os.ReadFile(arguments[0])
			if err != nil {
				return notThere(fmt.Errorf("get file: %w", err))
			}
			_, err = options.Stdout.Write(content)
			return err
		},
	}
	var mode, owner string
	put := &cobra.Command{
		Use: "put PATH", Short: "Replace the file by standard input", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, arguments []string) error {
			if err := options.allowed(arguments[0]); err != nil {
				return err
			}
			return put(options.Stdin, arguments[0], mode, owner)
		},
	}
	put.Flags().StringVar(&mode, "mode", "0600", "octal mode")
	put.Flags().StringVar(&owner, "owner", "", "user or user:group, by name or number (default: who runs this)")
	sum := &cobra.Command{
		Use: "sum PATH", Short: "Print the file's digest", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, arguments []string) error {
			if err := options.allowed(arguments[0]); err != nil {
				return err
			}
			var answer struct {
				SHA256 string `json:"sha256"`
				Exists bool   `json:"exists"`
			}
			content, err := os.ReadFile(arguments[0])
			switch {
			case err == nil:
				digest := sha256.Sum256(content)
				answer.SHA256, answer.Exists = hex.EncodeToString(digest[:]), true
			case !errors.Is(err, fs.ErrNotExist):
				return fmt.Errorf("sum file: %w", err)
			}
			return options.print(answer)
		},
	}
	command.AddCommand(get, put, sum)
	return command
}

func (o Options) allowed(path string) error {
	if path != o.InitFile && path != o.UnsealKeyFile {
		return fmt.Errorf("file %q: only %s and %s may be read and written", path, o.InitFile, o.UnsealKeyFile)
	}
	return nil
}

func put(input io.Reader, path, mode, owner string) error {
	bits, err := strconv.ParseUint(mode, 8, 12)
	if err != nil || bits&0o077 != 0 {
		return fmt.Errorf("put file: mode %q: want an octal mode for the owner alone, such as 0600", mode)
	}
	written := atomicfile.Options{Mode: fs.FileMode(bits)}
	if owner != "" {
		written.Chown = true
		if written.UID, written.GID, err = lookUp(owner); err != nil {
			return fmt.Errorf("put file: %w", err)
		}
	}
	// All of it is read first, so that a cut connection replaces nothing.
	content, err := io.ReadAll(io.LimitReader(input, maxFile+1))
	switch {
	case err != nil:
		return fmt.Errorf("put file: %w", err)
	case len(content) == 0:
		return errors.New("put file: nothing came on standard input")
	case len(content) > maxFile:
		return fmt.Errorf("put file: more than %d bytes", maxFile)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("put file: %w", err)
	}
	return atomicfile.Write(path, bytes.NewReader(content), written)
}

func lookUp(owner string) (uid, gid int, err error) {
	name, groupName, hasGroup := strings.Cut(owner, ":")
	found, err := user.Lookup(name)
	if err != nil {
		if found, err = user.LookupId(name); err != nil {
			return 0, 0, fmt.Errorf("owner %q: %w", owner, err)
		}
	}
	groupID := found.Gid
	if hasGroup {
		group, err := user.LookupGroup(groupName)
		if err != nil {
			if group, err = user.LookupGroupId(groupName); err != nil {
				return 0, 0, fmt.Errorf("owner %q: %w", owner, err)
			}
		}
		groupID = group.Gid
	}
	uid, uidErr := strconv.Atoi(found.Uid)
	gid, gidErr := strconv.Atoi(groupID)
	return uid, gid, errors.Join(uidErr, gidErr)
}
