package nomad

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"
)

// InUse is what the allocations of some jobs were started with.
type InUse struct {
	// Generations are, by secret and sorted, those of all allocations that have
	// not ended. What their templates find in a variable is not among them, nor what
	// they only accept, by `?version=previous`.
	Generations map[string][]int
	// Unready are the sorted names of nodes that do not answer and that have, or
	// had, an allocation of the jobs: what runs there nobody knows.
	Unready []string
}

// GenerationsInUse reads which generations of secrets the jobs still use, but for
// what runs on the nodes that are named.
func (c *Client) GenerationsInUse(ctx context.Context, jobIDs []string, without ...string) (InUse, error) {
	away, err := c.nodesAway(ctx)
	if err != nil {
		return InUse{}, err
	}
	used := InUse{Generations: map[string][]int{}}
	for _, id := range jobIDs {
		// All: a job that was purged may still be stopping.
		allocations, _, err := c.api.Jobs().Allocations(id, true, c.query(ctx))
		if err != nil {
			return InUse{}, describe(err, "list allocations of job %s", id)
		}
		for _, allocation := range allocations {
			if slices.Contains(without, allocation.NodeName) {
				continue
			}
			if name, isAway := away[allocation.NodeID]; isAway {
				used.Unready = append(used.Unready, name)
			}
			if ended(allocation) {
				continue
			}
			if err := c.addGenerations(ctx, allocation.ID, used.Generations); err != nil {
				return InUse{}, err
			}
		}
	}
	slices.Sort(used.Unready)
	used.Unready = slices.Compact(used.Unready)
	for name, generations := range used.Generations {
		slices.Sort(generations)
		used.Generations[name] = slices.Compact(generations)
	}
	return used, nil
}

// ended reports whether no task of an allocation runs any more, or ever will.
func ended(allocation *api.AllocationListStub) bool {
	switch allocation.ClientStatus {
	case api.AllocClientStatusComplete, api.AllocClientStatusFailed, api.AllocClientStatusLost:
		return true
	}
	return false
}

// addGenerations notes what the templates of one allocation were pinned to. The
// allocation itself says it: the job may have forgotten so old a version.
func (c *Client) addGenerations(ctx context.Context, id string, generations map[string][]int) error {
	allocation, _, err := c.api.Allocations().Info(id, c.query(ctx))
	if statusOf(err) == http.StatusNotFound {
		return nil // it ended, and Nomad forgot it, a moment ago
	}
	if err != nil {
		return describe(err, "read allocation %s", short(id))
	}
	if allocation.Job == nil {
		return nil
	}
	for name, generation := range secretsOf(allocation.Job.Meta) {
		if strings.HasSuffix(name, previousRead) {
			continue // it only accepts that one, until it is told to forget it
		}
		generations[name] = append(generations[name], generation)
	}
	return nil
}

// NodesNotReady returns the sorted names of the nodes that do not answer. Nomad
// forgets a node that was away for a day: compare with what is declared too.
func (c *Client) NodesNotReady(ctx context.Context) ([]string, error) {
	away, err := c.nodesAway(ctx)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(away))
	for _, name := range away {
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// nodesAway are the names, by id, of the nodes that are not ready.
func (c *Client) nodesAway(ctx context.Context) (map[string]string, error) {
	nodes, _, err := c.api.Nodes().List(c.query(ctx))
	if err != nil {
		return nil, describe(err, "list nodes")
	}
	away := map[string]string{}
	for _, node := range nodes {
		if node.Status != api.NodeStatusReady {
			away[node.ID] = node.Name
		}
	}
	return away, nil
}
