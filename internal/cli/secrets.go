package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

func newSecrets(env Environment, flags *globalFlags) *cobra.Command {
	command := &cobra.Command{
		Use: "secrets", Short: "Look at the catalogue of secrets, bring and prove values", Args: cobra.NoArgs,
		Long: `Components declare secrets in jobs/NAME/component.hcl, by name: git never holds a
value. A deploy makes generated ones; external ones are brought with import or
set. A secret's full name is COMPONENT.NAME. Values are never taken from the
command line and shown only by get --reveal.
`,
	}
	command.AddCommand(newSecretsStatus(env, flags), newSecretsImport(env, flags), newSecretsSet(env, flags),
		newSecretsGet(env, flags), newSecretsVerify(env, flags), newSecretsRotate(env, flags), newSecretsHistory(env, flags))
	return command
}

func newSecretsStatus(env Environment, flags *globalFlags) *cobra.Command {
	of, check := &siteFlags{}, false
	command := &cobra.Command{
		Use: "status", Short: "Show each secret's source, generation, age and consumers", Args: cobra.NoArgs,
		Long: "Shows what is known of each secret of the catalogue but its value. It writes nothing.",
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil // it only looks
			status, err := deploy.ReadSecretsStatus(command.Context(), options)
			if err != nil {
				return err
			}
			if flags.json {
				err = printJSON(env.Out, status)
			} else {
				err = printSecrets(env.Out, status)
			}
			for _, row := range status.Secrets {
				if err == nil && check && row.State != deploy.SecretOK && row.State != deploy.SecretRotating && row.State != deploy.SecretRetiring {
					return errChanges
				}
			}
			return err
		},
	}
	of.add(command)
	command.Flags().BoolVar(&check, "check", false, "exit with code 2 if a value is missing, expires soon, or is due for rotation")
	return command
}

func printSecrets(w io.Writer, status deploy.SecretsStatus) error {
	if len(status.Secrets) == 0 {
		_, err := fmt.Fprintln(w, "the catalogue is empty")
		return err
	}
	writer := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(writer, "SECRET\tSTATE\tSOURCE\tGENERATION\tAGE\tDUE\tEXPIRES\tCONSUMERS")
	for _, row := range status.Secrets {
		age, due, expires := "-", "-", "-"
		if row.Created != nil {
			age = strings.TrimSuffix(humanize.Time(*row.Created), " ago")
		}
		if row.Expires != nil {
			expires = row.Expires.Format(time.DateOnly)
		}
		if row.Due != nil {
			due = row.Due.Format(time.DateOnly)
		}
		_, _ = fmt.Fprintf(writer, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", row.Name, row.State, row.Source, row.Generation, age, due, expires,
			strings.Join(row.Consumers, ", "))
	}
	return writer.Flush()
}

// storeFlags are those of the commands that bring values.
type storeFlags struct {
	siteFlags
	skipCheck bool
	expires   string
}

func (f *storeFlags) addStore(command *cobra.Command) {
	f.add(command)
	command.Flags().BoolVar(&f.skipCheck, "skip-check", false, "store the value without running its check")
	command.Flags().StringVar(&f.expires, "expires", "", "when the value stops to work, such as 2027-06-30: `site secrets status` warns before")
}

func (f *storeFlags) store(command *cobra.Command, env Environment, flags *globalFlags, values []deploy.NewValue) error {
	options, err := f.options(env, flags)
	if err != nil {
		return err
	}
	if f.expires != "" {
		expires, err := time.Parse(time.DateOnly, f.expires)
		if err != nil {
			return plan.WithHint(fmt.Errorf("--expires %q is not a date", f.expires), "write it as 2027-06-30")
		}
		for i := range values {
			values[i].Expires = expires
		}
	}
	stored, err := deploy.StoreSecrets(command.Context(), options, values, deploy.StoreOptions{SkipChecks: f.skipCheck})
	if err != nil {
		return err
	}
	if flags.json {
		return printJSON(env.Out, map[string]any{"schema": "site.secrets_stored/v1", "secrets": stored})
	}
	for _, one := range stored {
		what := "stored"
		if one.Unchanged {
			what = "has this value already"
		}
		_, _ = fmt.Fprintf(env.Out, "%s: %s, generation %d\n", one.Name, what, one.Generation)
		if one.NewlineCut {
			_, _ = fmt.Fprintf(env.Err, "%s: the newline at the end was cut off; trailing_newline = \"keep\" in component.hcl keeps it\n", one.Name)
		}
	}
	return nil
}

func newSecretsImport(env Environment, flags *globalFlags) *cobra.Command {
	of := &storeFlags{}
	var file, folder string
	var fromCommand bool
	command := &cobra.Command{
		Use: "import NAME [-- COMMAND…]", Short: "Bring the value of an external secret",
		Long: `Brings a value from a file that only you can read (mode 0600), from standard
input, or from what a command prints, such as a password manager's. With
--from-folder it brings several: files named like the secrets. Everything that
is wrong is said at once, and then nothing is stored.

The jobs that read a secret get a new value at the next deploy; site secrets
rotate NAME --from-file brings it to them at once, and tries it before.
`,
		Example: `  site secrets import shop.stripe_key --from-file=stripe.key
  site secrets import shop.stripe_key --from-file=- < stripe.key
  site secrets import shop.stripe_key --from-command -- op read op://shop/stripe/key
  site secrets import shop.stripe_key --from-command -- sops --decrypt --extract '["stripe"]' keys.yaml
  site secrets import --from-folder=keys`,
		Args: cobra.ArbitraryArgs,
		RunE: func(command *cobra.Command, args []string) error {
			values, err := importedValues(command, env, args, file, folder, fromCommand)
			if err != nil {
				return err
			}
			return of.store(command, env, flags, values)
		},
	}
	of.addStore(command)
	command.Flags().StringVar(&file, "from-file", "", "the file with the value (mode 0600), or - for standard input")
	command.Flags().StringVar(&folder, "from-folder", "", "a folder with a file for each secret, named like it")
	command.Flags().BoolVar(&fromCommand, "from-command", false, "take what the command behind -- prints")
	return command
}

func importedValues(command *cobra.Command, env Environment, args []string, file, folder string, fromCommand bool) ([]deploy.NewValue, error) {
	names, rest := args, []string(nil)
	if dash := command.ArgsLenAtDash(); dash >= 0 {
		names, rest = args[:dash], args[dash:]
	}
	sources := 0
	for _, given := range []bool{file != "", folder != "", fromCommand} {
		if given {
			sources++
		}
	}
	switch {
	case sources != 1:
		return nil, plan.WithHint(errors.New("say where the value comes from, in one way"), "give one of --from-file, --from-folder and --from-command")
	case folder != "" && len(args) > 0:
		return nil, plan.WithHint(errors.New("--from-folder takes the names from the files"), "leave the name out")
	case folder == "" && len(names) != 1:
		return nil, plan.WithHint(fmt.Errorf("want one name, got %d", len(names)), "a value must not stand on the command line: others can read it there")
	case fromCommand && len(rest) == 0:
		return nil, plan.WithHint(errors.New("--from-command without a command"), "write it behind --, such as: -- op read op://vault/item/field")
	case !fromCommand && len(rest) > 0:
		return nil, plan.WithHint(errors.New("a command is given and --from-command is not"), "add --from-command")
	}
	switch {
	case folder != "":
		return folderValues(folder)
	case fromCommand:
		process := exec.CommandContext(command.Context(), rest[0], rest[1:]...)
		process.Stdin, process.Stderr = env.In, env.Err // it may ask for a password
		output, err := process.Output()
		if err != nil {
			return nil, plan.WithHint(fmt.Errorf("run %s: %w", rest[0], err), "run it by hand: it must print the value and end with 0")
		}
		return []deploy.NewValue{{Name: names[0], Value: secret.New(string(output))}}, nil
	}
	value, err := fileValue(env, file)
	return []deploy.NewValue{{Name: names[0], Value: value, Problem: err}}, nil
}

// mostBytes bounds what is read at all; the catalogue's own limit is lower and
// says more.
const mostBytes = 4 << 20

func fileValue(env Environment, path string) (secret.Value, error) {
	if path == "-" {
		content, err := io.ReadAll(io.LimitReader(env.In, mostBytes))
		if err != nil {
			return secret.Value{}, fmt.Errorf("read the value: %w", err)
		}
		return secret.New(string(content)), nil
	}
	opened, err := os.Open(path)
	if err != nil {
		return secret.Value{}, plan.WithHint(fmt.Errorf("secret file: %w", err), "give the path of a file with the value, or - for standard input")
	}
	defer opened.Close()
	info, err := opened.Stat()
	switch {
	case err != nil:
		return secret.Value{}, fmt.Errorf("secret file: %w", err)
	case !info.Mode().IsRegular():
		return secret.Value{}, plan.WithHint(fmt.Errorf("secret file %s is not a regular file", path), "use --from-file=- for a pipe")
	case info.Mode().Perm()&0o077 != 0:
		return secret.Value{}, plan.WithHint(fmt.Errorf("secret file %s has mode %04o: others can read it", path, info.Mode().Perm()), "chmod 600 %s", path)
	}
	content, err := io.ReadAll(io.LimitReader(opened, mostBytes))
	if err != nil {
		return secret.Value{}, fmt.Errorf("secret file %s: %w", path, err)
	}
	return secret.New(string(content)), nil
}

func folderValues(folder string) ([]deploy.NewValue, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, fmt.Errorf("secret files: %w", err)
	}
	var values []deploy.NewValue
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			continue
		}
		value, err := fileValue(Environment{}, filepath.Join(folder, entry.Name()))
		values = append(values, deploy.NewValue{Name: entry.Name(), Value: value, Problem: err})
	}
	if len(values) == 0 {
		return nil, plan.WithHint(fmt.Errorf("%s holds no files", folder), "name each file like its secret, such as shop.stripe_key")
	}
	return values, nil
}

func newSecretsSet(env Environment, flags *globalFlags) *cobra.Command {
	of := &storeFlags{}
	command := &cobra.Command{
		Use: "set NAME", Short: "Ask for the value of an external secret", Args: cobra.ExactArgs(1),
		Long: "Asks for a value on the terminal, without showing it. From a file or another program, use import.",
		RunE: func(command *cobra.Command, args []string) error {
			terminal, ok := env.In.(*os.File)
			if !ok || !term.IsTerminal(int(terminal.Fd())) {
				return plan.WithHint(errors.New("there is no terminal to ask on"), "use: site secrets import %s --from-file=-", args[0])
			}
			_, _ = fmt.Fprintf(env.Err, "value of %s: ", args[0])
			content, err := term.ReadPassword(int(terminal.Fd()))
			_, _ = fmt.Fprintln(env.Err)
			if err != nil {
				return fmt.Errorf("read the value: %w", err)
			}
			return of.store(command, env, flags, []deploy.NewValue{{Name: args[0], Value: secret.New(string(content))}})
		},
	}
	of.addStore(command)
	return command
}

func newSecretsGet(env Environment, flags *globalFlags) *cobra.Command {
	of, reveal := &siteFlags{}, false
	command := &cobra.Command{
		Use: "get NAME", Short: "Read one value", Args: cobra.ExactArgs(1),
		Long:    "Prints a value, only with --reveal. Without it, it says whether there is one, and its generation.",
		Example: "  site secrets get shop.stripe_key --reveal | wl-copy",
		RunE: func(command *cobra.Command, args []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil // it only looks
			value, generation, err := deploy.ReadSecret(command.Context(), options, args[0])
			if err != nil {
				return err
			}
			shown := value.String()
			if reveal {
				shown = value.Reveal()
			}
			if flags.json {
				return printJSON(env.Out, map[string]any{"schema": "site.secret/v1", "name": args[0], "generation": generation, "value": shown})
			}
			if !reveal {
				_, err = fmt.Fprintf(env.Out, "%s: %s, generation %d\n", args[0], shown, generation)
				return err
			}
			_, err = io.WriteString(env.Out, shown)
			if err == nil && isTerminal(env.Out) {
				_, err = fmt.Fprintln(env.Out)
			}
			return err
		},
	}
	of.add(command)
	command.Flags().BoolVar(&reveal, "reveal", false, "print the value itself, and nothing else")
	return command
}

func newSecretsVerify(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use: "verify [NAME…]", Short: "Prove that values work", Args: cobra.ArbitraryArgs,
		Long: `Proves that values work: external ones by the check that the catalogue declares,
those of database roles by logging in. Exit code 2 if one does not.
`,
		RunE: func(command *cobra.Command, args []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil // it only looks
			verified, err := deploy.VerifySecrets(command.Context(), options, args)
			if err != nil {
				return err
			}
			failed := false
			for _, one := range verified {
				failed = failed || one.Problem != ""
			}
			if flags.json {
				err = printJSON(env.Out, map[string]any{"schema": "site.secrets_verified/v1", "secrets": verified})
			} else {
				for _, one := range verified {
					says := "works (" + one.Proof + ")"
					switch {
					case one.Problem != "":
						says = "FAILS: " + one.Problem
					case one.Proof == "none":
						says = "has a value, and no way to prove it is declared"
					}
					_, _ = fmt.Fprintf(env.Out, "%s: %s\n", one.Name, says)
				}
			}
			if err == nil && failed {
				return errChanges
			}
			return err
		},
	}
	of.add(command)
	return command
}
