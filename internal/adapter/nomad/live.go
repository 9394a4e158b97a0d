package nomad

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"
)

// variableTries bounds how often a variable is read anew that somebody else
// wrote at the same moment.
const variableTries = 5

// PutLive writes the generations where they differ. What others keep in the
// same variables stays.
func (c *Client) PutLive(ctx context.Context, live []LiveGenerations) error {
	for _, one := range live {
		if err := c.putLive(ctx, one); err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) putLive(ctx context.Context, live LiveGenerations) error {
	for range variableTries {
		have, err := c.variable(ctx, live.Path)
		if err != nil {
			return err
		}
		items := maps.Clone(have.Items)
		if items == nil {
			items = api.VariableItems{}
		}
		maps.Copy(items, live.Items)
		if maps.Equal(items, have.Items) {
			return nil
		}
		wanted := &api.Variable{Namespace: api.DefaultNamespace, Path: live.Path, Items: items, ModifyIndex: have.ModifyIndex}
		_, _, err = c.api.Variables().CheckedUpdate(wanted, c.write(ctx))
		var conflict api.ErrCASConflict
		switch {
		case err == nil:
			return nil
		case !errors.As(err, &conflict):
			return describe(err, "write nomad variable %s", live.Path)
		}
	}
	return fmt.Errorf("write nomad variable %s: others keep writing it", live.Path)
}

// variable reads one variable; one without items and index 0 where there is none.
func (c *Client) variable(ctx context.Context, path string) (*api.Variable, error) {
	have, _, err := c.api.Variables().Peek(path, c.query(ctx))
	if err != nil && statusOf(err) != http.StatusNotFound {
		return nil, describe(err, "read nomad variable %s", path)
	}
	if have == nil {
		have = &api.Variable{Path: path}
	}
	return have, nil
}

// Live reads our items by the path of their variable. A variable without any
// is left out.
func (c *Client) Live(ctx context.Context, paths []string) (map[string]map[string]string, error) {
	found := map[string]map[string]string{}
	for _, path := range slices.Compact(slices.Sorted(slices.Values(paths))) {
		variable, err := c.variable(ctx, path)
		if err != nil {
			return nil, err
		}
		for name, value := range variable.Items {
			if !strings.HasPrefix(name, liveItem) && !strings.HasPrefix(name, livePrevious) {
				continue
			}
			if found[path] == nil {
				found[path] = map[string]string{}
			}
			found[path][name] = value
		}
	}
	return found, nil
}
