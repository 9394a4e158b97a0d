package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/jobs"
)

func newOperators(env Environment, flags *globalFlags) *cobra.Command {
	command := &cobra.Command{
		Use: "operators", Short: "List, add and remove those who may log in", Args: cobra.NoArgs,
		Long: `Operators log in to Nomad and OpenBao with the SSH key they have. They are part of
sites/NAME/site.hcl: add and remove edit that file in the work tree. Commit it
and run site deploy: from then on a removed operator is refused, and their
tokens in OpenBao are revoked. Nomad's ACLs are changed by site bootstrap-deploy
alone, with the site root token: it lets who is new into Nomad, and revokes the
tokens there that a removed operator still holds, which end by themselves within
30 minutes. Their key in the hosts' authorized_keys is yours to remove.
`,
	}
	command.AddCommand(newOperatorsList(env, flags), newOperatorsAdd(env, flags), newOperatorsRemove(env, flags))
	return command
}

// workTreeSite is a site as it is in the work tree, committed or not.
type workTreeSite struct {
	folder, name, path string
	content            []byte
	site               *site.Site
}

func openWorkTree(flags *globalFlags, name string) (*workTreeSite, error) {
	tree := os.DirFS(flags.folder)
	if name == "" {
		names, err := site.Names(tree)
		if err != nil {
			return nil, err
		}
		if len(names) != 1 {
			return nil, plan.WithHint(fmt.Errorf("the work tree has %d sites", len(names)), "say which with --site: %s", strings.Join(names, ", "))
		}
		name = names[0]
	}
	w := &workTreeSite{folder: flags.folder, name: name, path: filepath.Join(flags.folder, "sites", name, "site.hcl")}
	var err error
	if w.site, err = w.load(); err != nil {
		return nil, err
	}
	w.content, err = os.ReadFile(w.path)
	return w, err
}

func (w *workTreeSite) load() (*site.Site, error) {
	return site.Load(os.DirFS(w.folder), w.name, site.LoadOptions{WorkDir: w.folder, Platform: jobs.FS()})
}

// replace writes the file, unless what it says then is no valid site.
func (w *workTreeSite) replace(content []byte) error {
	temporary := w.path + ".new"
	info, err := os.Stat(w.path)
	if err != nil {
		return err
	}
	if err := os.WriteFile(temporary, content, info.Mode().Perm()); err != nil {
		return err
	}
	if err := os.Rename(temporary, w.path); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	if _, err := w.load(); err != nil {
		return errors.Join(err, os.WriteFile(w.path, w.content, info.Mode().Perm()))
	}
	return nil
}

func newOperatorsList(env Environment, flags *globalFlags) *cobra.Command {
	name := ""
	command := &cobra.Command{
		Use: "list", Short: "List the operators with their keys' fingerprints", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			tree, err := openWorkTree(flags, name)
			if err != nil {
				return err
			}
			type row struct {
				Name        string `json:"name"`
				Type        string `json:"key_type"`
				Fingerprint string `json:"fingerprint"`
				Rights      string `json:"rights"`
			}
			rows := []row{}
			for _, operator := range tree.site.Operators {
				keyType, fingerprint := operator.Fingerprint()
				rows = append(rows, row{operator.Name, keyType, fingerprint, operator.Rights})
			}
			if flags.json {
				return printJSON(env.Out, map[string]any{"schema": "site.operators/v1", "site": tree.name, "operators": rows})
			}
			writer := tabwriter.NewWriter(env.Out, 0, 0, 3, ' ', 0)
			_, _ = fmt.Fprintln(writer, "OPERATOR\tRIGHTS\tKEY\tFINGERPRINT")
			for _, row := range rows {
				_, _ = fmt.Fprintf(writer, "%s\t%s\t%s\t%s\n", row.Name, row.Rights, row.Type, row.Fingerprint)
			}
			return writer.Flush()
		},
	}
	command.Flags().StringVar(&name, "site", "", "the site; may be left out when there is one")
	return command
}

func newOperatorsAdd(env Environment, flags *globalFlags) *cobra.Command {
	var name, keyFile, rights string
	command := &cobra.Command{
		Use: "add NAME", Short: "Let somebody log in with an SSH key", Args: cobra.ExactArgs(1),
		Example: "  site operators add alice --public-key-file=alice.pub\n  site operators add cron --public-key-file=cron.pub --rights=rotate",
		RunE: func(_ *cobra.Command, args []string) error {
			if keyFile == "" {
				return plan.WithHint(errors.New("--public-key-file is not given"), "name the file with their public key, such as alice.pub")
			}
			content, err := os.ReadFile(expandHome(keyFile))
			if err != nil {
				return plan.WithHint(fmt.Errorf("operator's public key: %w", err), "name a public key file, such as ~/.ssh/id_ed25519.pub")
			}
			tree, err := openWorkTree(flags, name)
			if err != nil {
				return err
			}
			changed, err := site.AddOperator(tree.content, args[0], string(content), rights)
			if err != nil {
				return err
			}
			return tree.changed(env, changed, "added "+args[0])
		},
	}
	command.Flags().StringVar(&name, "site", "", "the site; may be left out when there is one")
	command.Flags().StringVar(&keyFile, "public-key-file", "", "their public key")
	command.Flags().StringVar(&rights, "rights", site.RightsDeploy, `"deploy", or "rotate" for a machine that only rotates secrets`)
	return command
}

func newOperatorsRemove(env Environment, flags *globalFlags) *cobra.Command {
	name := ""
	command := &cobra.Command{
		Use: "remove NAME", Short: "Let somebody log in no longer", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			tree, err := openWorkTree(flags, name)
			if err != nil {
				return err
			}
			changed, err := site.RemoveOperator(tree.content, args[0])
			if err != nil {
				return err
			}
			return tree.changed(env, changed, "removed "+args[0])
		},
	}
	command.Flags().StringVar(&name, "site", "", "the site; may be left out when there is one")
	return command
}

// changed writes the file and says what is left to do.
func (w *workTreeSite) changed(env Environment, content []byte, what string) error {
	if err := w.replace(content); err != nil {
		return err
	}
	_, err := fmt.Fprintf(env.Out, "%s: %s\nnow: git commit -m \"Operators\" sites/%s/site.hcl && site deploy --site=%s\nNomad's part: site bootstrap-deploy --site=%s --root-token-file=FILE\n",
		w.path, what, w.name, w.name, w.name)
	return err
}
