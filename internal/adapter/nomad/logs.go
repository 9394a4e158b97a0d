package nomad

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sort"
	"strconv"
	"strings"
	"sync"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
)

// Stream is one of a task's outputs.
type Stream string

// The streams; Both interleaves them line by line while following, and shows
// stderr after stdout otherwise.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
	Both   Stream = "both"
)

const (
	tailLines = 20
	// tailBytes is read from the end of a log to find its last lines.
	tailBytes = 16 << 10
)

// LogOptions choose what Logs shows.
type LogOptions struct {
	Job string
	// Alloc is an allocation's id or its beginning; empty for the newest of the job.
	Alloc string
	// Task may be empty where the allocation has one task.
	Task   string
	Stream Stream // default Both
	Follow bool
	// Tail is how many bytes from the end are shown; 0 for all that is kept.
	Tail int64
}

// Logs copies a task's log to w, until ctx ends when following.
func (c *Client) Logs(ctx context.Context, options LogOptions, w io.Writer) error {
	allocation, err := c.findAllocation(ctx, options.Job, options.Alloc)
	if err != nil {
		return err
	}
	task, err := findTask(allocation, options.Task)
	if err != nil {
		return err
	}
	streams := []Stream{options.Stream}
	if options.Stream == Both || options.Stream == "" {
		streams = []Stream{Stdout, Stderr}
	}
	if !options.Follow || len(streams) == 1 {
		for _, stream := range streams {
			if err := c.copyLog(ctx, allocation.ID, task, stream, options, w); err != nil {
				return ignoreEnd(ctx, err)
			}
		}
		return nil
	}
	shared := &lineWriter{w: w}
	errs := make([]error, len(streams))
	var group sync.WaitGroup
	for i, stream := range streams {
		group.Go(func() {
			part := &streamWriter{shared: shared}
			errs[i] = ignoreEnd(ctx, c.copyLog(ctx, allocation.ID, task, stream, options, part))
			part.flush()
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

// ignoreEnd: the caller ending a follow is no failure.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (c *Client) copyLog(ctx context.Context, alloc, task string, stream Stream, options LogOptions, w io.Writer) error {
	body, err := c.openLog(ctx, alloc, task, stream, options.Follow, options.Tail)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	plain := &plainWriter{w: w}
	_, err = io.Copy(plain, body)
	if err = errors.Join(err, plain.flush()); err != nil {
		return fmt.Errorf("read %s of task %s: %w", stream, task, err)
	}
	return nil
}

// openLog reads through the server: nodes answer only on their own loopback.
func (c *Client) openLog(ctx context.Context, alloc, task string, stream Stream, follow bool, tail int64) (io.ReadCloser, error) {
	query := c.query(ctx)
	query.Params = map[string]string{
		"task": task, "type": string(stream), "plain": "true",
		"follow": strconv.FormatBool(follow), "origin": api.OriginStart, "offset": "0",
	}
	if tail > 0 {
		query.Params["origin"], query.Params["offset"] = api.OriginEnd, strconv.FormatInt(tail, 10)
	}
	body, err := c.api.Raw().Response("/v1/client/fs/logs/"+url.PathEscape(alloc), query)
	if err != nil {
		return nil, describe(err, "read %s of task %s in allocation %s", stream, task, short(alloc))
	}
	return body, nil
}

func (c *Client) logTail(ctx context.Context, alloc, task string, stream Stream, lines int) ([]logLine, error) {
	body, err := c.openLog(ctx, alloc, task, stream, false, tailBytes)
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	content, err := io.ReadAll(io.LimitReader(body, tailBytes))
	if err != nil {
		return nil, fmt.Errorf("read %s of task %s: %w", stream, task, err)
	}
	return lastLines(string(content), stream, lines), nil
}

func (c *Client) findAllocation(ctx context.Context, id, prefix string) (*api.AllocationListStub, error) {
	allocations, _, err := c.api.Jobs().Allocations(id, false, c.query(ctx))
	if err != nil {
		return nil, describe(err, "list allocations of job %s", id)
	}
	var found *api.AllocationListStub
	for _, allocation := range allocations {
		if !strings.HasPrefix(allocation.ID, prefix) {
			continue
		}
		if found == nil || found.CreateIndex < allocation.CreateIndex {
			found = allocation
		}
	}
	if found == nil {
		what := fmt.Sprintf("job %s has no allocation", id)
		if prefix != "" {
			what += " " + prefix
		}
		return nil, plan.WithHint(errors.New(what), "see what runs with: site status")
	}
	return found, nil
}

func findTask(allocation *api.AllocationListStub, task string) (string, error) {
	names := make([]string, 0, len(allocation.TaskStates))
	for name := range allocation.TaskStates {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if name == task || task == "" && len(names) == 1 {
			return name, nil
		}
	}
	if task == "" {
		return "", plan.WithHint(fmt.Errorf("job %s has %d tasks", allocation.JobID, len(names)), "name one of: %s", strings.Join(names, ", "))
	}
	return "", plan.WithHint(fmt.Errorf("job %s has no task %q", allocation.JobID, task), "name one of: %s", strings.Join(names, ", "))
}

// lineWriter takes whole lines of several streams.
type lineWriter struct {
	mutex sync.Mutex
	w     io.Writer
}

type streamWriter struct {
	shared *lineWriter
	rest   []byte
}

func (s *streamWriter) Write(content []byte) (int, error) {
	s.rest = append(s.rest, content...)
	end := strings.LastIndexByte(string(s.rest), '\n') + 1
	if end == 0 {
		return len(content), nil
	}
	s.shared.mutex.Lock()
	defer s.shared.mutex.Unlock()
	_, err := s.shared.w.Write(s.rest[:end])
	s.rest = append([]byte(nil), s.rest[end:]...)
	return len(content), err
}

func (s *streamWriter) flush() {
	if len(s.rest) > 0 {
		_, _ = s.Write([]byte("\n"))
	}
}

// Row is one job of a site in `site status`.
type Row struct {
	Component string `json:"component"`
	Job       string `json:"job"`
	Type      string `json:"type"`
	GitSHA    string `json:"git_sha"`
	Version   uint64 `json:"version"`
	Status    string `json:"status"`
	Healthy   bool   `json:"healthy"`
	Reason    string `json:"reason,omitempty"`
	Running   int    `json:"running"`
	Wanted    int    `json:"wanted"`
	// Images are the digests of the tasks' images by group/task.
	Images map[string]string `json:"images,omitempty"`
	Nodes  []string          `json:"nodes,omitempty"`
}

// Status lists the jobs of a site, ordered by component.
func (c *Client) Status(ctx context.Context, site string) ([]Row, error) {
	stubs, err := c.jobsOf(ctx, site)
	if err != nil {
		return nil, err
	}
	var rows []Row
	for _, stub := range stubs {
		shot, err := c.snapshot(ctx, stub.ID)
		if err != nil {
			return nil, err
		}
		if shot.job != nil {
			rows = append(rows, rowOf(shot))
		}
	}
	sort.Slice(rows, func(i, j int) bool {
		if rows[i].Component != rows[j].Component {
			return rows[i].Component < rows[j].Component
		}
		return rows[i].Job < rows[j].Job
	})
	return rows, nil
}

func rowOf(shot snapshot) Row {
	live := shot.job
	version := number(live.Version)
	count := countAllocations(shot, version)
	health := healthOf(shot)
	row := Row{
		Component: live.Meta[job.MetaComponent], Job: text(live.ID), Type: text(live.Type),
		GitSHA: live.Meta[job.MetaGitSHA], Version: version, Status: text(live.Status),
		Healthy: health.Healthy, Reason: health.Reason, Running: count.running, Wanted: count.wanted,
		Images: map[string]string{},
	}
	if flag(live.Stop) {
		row.Status, row.Wanted = "stopped", 0
	}
	for task, image := range imagesOf(live) {
		if _, digest, ok := strings.Cut(image, "@"); ok {
			row.Images[task] = digest
		}
	}
	for _, allocation := range current(shot, version) {
		if allocation.ClientStatus == api.AllocClientStatusRunning {
			row.Nodes = append(row.Nodes, allocation.NodeName)
		}
	}
	return row
}

// releaseKey is the one item of a release variable.
const releaseKey = "json"

// PutReleaseVariable mirrors a release record into a Nomad variable; an equal
// one is not written again. The record on the host stays the authority.
func (c *Client) PutReleaseVariable(ctx context.Context, path string, json []byte) error {
	have, err := c.GetReleaseVariable(ctx, path)
	if err != nil {
		return err
	}
	if string(have) == string(json) {
		return nil
	}
	variable := &api.Variable{Namespace: api.DefaultNamespace, Path: path, Items: api.VariableItems{releaseKey: string(json)}}
	if _, _, err := c.api.Variables().Update(variable, c.write(ctx)); err != nil {
		return describe(err, "write nomad variable %s", path)
	}
	return nil
}

// GetReleaseVariable reads it back; nil if there is none.
func (c *Client) GetReleaseVariable(ctx context.Context, path string) ([]byte, error) {
	variable, _, err := c.api.Variables().Peek(path, c.query(ctx))
	if err != nil && statusOf(err) != http.StatusNotFound {
		return nil, describe(err, "read nomad variable %s", path)
	}
	if variable == nil {
		return nil, nil
	}
	return []byte(variable.Items[releaseKey]), nil
}
