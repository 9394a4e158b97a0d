package site

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"
	"golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/plan"
)

// Fingerprint is the key's type and its SHA256 fingerprint, as ssh-keygen says them.
func (o Operator) Fingerprint() (keyType, fingerprint string) {
	key, err := parsePublicKey(o.PublicKey)
	if err != nil {
		return "", "" // site.Load let it pass, so it is one
	}
	return key.Type(), ssh.FingerprintSHA256(key)
}

// AddOperator puts an operator block at the end of site.hcl's site block, or
// behind the last operator. All else stays as it is, comments too. rights are
// RightsDeploy or RightsRotate.
func AddOperator(content []byte, name, publicKey, rights string) ([]byte, error) {
	if rights != RightsDeploy && rights != RightsRotate {
		return nil, plan.WithHint(fmt.Errorf("operator %s: %q are no rights", name, rights), "there are %q and %q", RightsDeploy, RightsRotate)
	}
	if !namePattern.MatchString(name) {
		return nil, plan.WithHint(fmt.Errorf("%q is not an operator's name", name), "%s", nameRule)
	}
	key, err := parsePublicKey(publicKey)
	if err != nil {
		return nil, plan.WithHint(fmt.Errorf("operator %s: %w", name, err), "give one line as in a .pub file; make a key with: ssh-keygen -t ed25519")
	}
	return editSite(content, func(body *hclwrite.Body) error {
		if findOperator(body, name) != nil {
			return plan.WithHint(fmt.Errorf("operator %s is there already", name), "remove it first, or choose another name")
		}
		if rights != RightsDeploy && len(deployers(body, "")) == 0 {
			return plan.WithHint(fmt.Errorf("operator %s could only rotate, and nobody could deploy", name), "add an operator with all rights first")
		}
		body.AppendNewline()
		block := body.AppendNewBlock("operator", []string{name})
		block.Body().SetAttributeValue("public_key", cty.StringVal(authorizedKey(key)))
		if rights != RightsDeploy {
			block.Body().SetAttributeValue("rights", cty.StringVal(rights))
		}
		return nil
	})
}

// RemoveOperator takes an operator block out; the last one who may deploy stays,
// since nobody could log in without it.
func RemoveOperator(content []byte, name string) ([]byte, error) {
	return editSite(content, func(body *hclwrite.Body) error {
		var names []string
		for _, block := range body.Blocks() {
			if block.Type() == "operator" {
				names = append(names, block.Labels()...)
			}
		}
		switch {
		case !slices.Contains(names, name):
			return plan.WithHint(fmt.Errorf("there is no operator %q", name), "there are: %s", strings.Join(names, ", "))
		case len(names) == 1:
			return plan.WithHint(fmt.Errorf("%s is the only operator: nobody could log in any more", name), "add another operator first")
		case len(deployers(body, name)) == 0:
			return plan.WithHint(fmt.Errorf("%s is the only operator who may deploy; the others can only rotate", name), "add another operator first")
		}
		body.RemoveBlock(findOperator(body, name))
		return nil
	})
}

// deployers are the operators who may do more than rotate, but one.
func deployers(body *hclwrite.Body, but string) []string {
	var names []string
	for _, block := range body.Blocks() {
		if block.Type() != "operator" || slices.Contains(block.Labels(), but) {
			continue
		}
		rights := block.Body().GetAttribute("rights")
		if rights == nil || strings.Trim(string(rights.Expr().BuildTokens(nil).Bytes()), "\" ") != RightsRotate {
			names = append(names, block.Labels()...)
		}
	}
	return names
}

func findOperator(body *hclwrite.Body, name string) *hclwrite.Block {
	return body.FirstMatchingBlock("operator", []string{name})
}

func editSite(content []byte, edit func(*hclwrite.Body) error) ([]byte, error) {
	file, diagnostics := hclwrite.ParseConfig(content, siteFileName, hcl.InitialPos)
	if diagnostics.HasErrors() {
		return nil, diagnostics
	}
	for _, block := range file.Body().Blocks() {
		if block.Type() == "site" {
			if err := edit(block.Body()); err != nil {
				return nil, err
			}
			return withoutHoles(content, hclwrite.Format(file.Bytes())), nil
		}
	}
	return nil, fmt.Errorf("%s has no site block", siteFileName)
}

// withoutHoles takes out the empty lines that a removed block leaves behind.
func withoutHoles(before, after []byte) []byte {
	const hole, gap = "\n\n\n", "\n\n"
	if bytes.Contains(before, []byte(hole)) {
		return after // some are its author's
	}
	for bytes.Contains(after, []byte(hole)) {
		after = bytes.ReplaceAll(after, []byte(hole), []byte(gap))
	}
	return after
}
