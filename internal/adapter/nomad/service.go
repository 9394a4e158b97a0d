package nomad

import (
	"context"
	"fmt"
	"net"
	"strconv"

	"github.com/nomad-site/site/internal/plan"
)

// ServiceAddress finds where a job's first service answers: the name of the
// node, and the address as seen from it.
func (c *Client) ServiceAddress(ctx context.Context, id string) (node, address string, err error) {
	found, _, err := c.api.Jobs().Services(id, c.query(ctx))
	if err != nil {
		return "", "", describe(err, "find services of job %s", id)
	}
	if len(found) == 0 {
		return "", "", plan.WithHint(fmt.Errorf("job %s has no service that is registered", id),
			"give an address such as 127.0.0.1:8080 instead, or see `site status`")
	}
	first := found[0]
	info, _, err := c.api.Nodes().Info(first.NodeID, c.query(ctx))
	if err != nil {
		return "", "", describe(err, "find node %s", first.NodeID)
	}
	return info.Name, net.JoinHostPort(first.Address, strconv.Itoa(first.Port)), nil
}
