package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/writesession"
)

// PushOptions may be left zero.
type PushOptions struct {
	// Progress is called with plain bytes, never by two goroutines at once. The
	// total may shrink as more becomes known.
	Progress func(done, total int64)
	// Workers upload at the same time; 0 is 4. Each holds a pack in memory.
	Workers int
}

// PushResult says what a Push has done.
type PushResult struct {
	// Blobs is how many the store lacked, Names how many were published.
	Blobs, Names int
	// Chunks were brought; ChunksDeduped of the lacking blobs were in the store already.
	Chunks, ChunksDeduped int
	// Packs were uploaded, with Requests to the object store, attempts that failed included.
	Packs, Requests int
	// BytesPlain is the length of the chunks before compression; BytesWire of all
	// request bodies, those to the service included.
	BytesPlain, BytesWire int64
}

const (
	// defaultWorkers fill an uplink whose round trips are long.
	defaultWorkers = 4
	// rounds are how often all is asked again after the service has refused to
	// complete, or a session has gone away.
	rounds = 3
	// mostAtOnce are the plain bytes of one session: it bounds the lists that both
	// sides hold, and what a completed session has brought is safe.
	mostAtOnce = 4 << 30
)

// Push brings what the store lacks of the offer into it, and publishes its names
// last. A Push that was cut off is resumed by the same Push, for an hour; one whose
// context ends takes its session back.
func (c *Client) Push(ctx context.Context, offer blob.Offer, options PushOptions) (PushResult, error) {
	if options.Workers <= 0 {
		options.Workers = defaultWorkers
	}
	count := &counter{progress: options.Progress}
	var err error
	for round := 1; round <= rounds; round++ {
		err = c.push(ctx, offer, options.Workers, round, count)
		if err == nil || !anotherRound(err) {
			break
		}
	}
	return count.result, err
}

// anotherRound reports whether asking anew what is missing may mend err: another
// Push has completed the session, it ran out, or an upload arrived damaged.
func anotherRound(err error) bool {
	var problem *ProblemError
	if !errors.As(err, &problem) {
		return false
	}
	switch problem.Type {
	case writesession.ProblemNotOpen, writesession.ProblemUnproven, writesession.ProblemConflict, writesession.ProblemNotFound:
		return true
	default:
		return false
	}
}

func (c *Client) push(ctx context.Context, offer blob.Offer, workers, round int, count *counter) error {
	lack, err := c.lacking(ctx, offer, count)
	if err != nil || lack.empty() {
		return err
	}
	var later int64
	for _, offered := range lack.blobs {
		later += offered.Source.Size()
	}
	for _, group := range grouped(lack, c.atOnce) {
		later -= group.size
		p := &pushing{client: c, group: group, count: count, workers: workers, later: later}
		if err := p.run(ctx, round); err != nil {
			return err
		}
	}
	return nil
}

// group is what one session brings.
type group struct {
	shortage
	size int64
}

// grouped cuts a shortage into sessions of at most that size, or of one blob; the
// names are in the last.
func grouped(lack shortage, most int64) []group {
	out := []group{{}}
	for _, offered := range lack.blobs {
		at := &out[len(out)-1]
		if size := offered.Source.Size(); at.size > 0 && at.size+size > most {
			out = append(out, group{})
			at = &out[len(out)-1]
		}
		at.blobs = append(at.blobs, offered)
		at.size += offered.Source.Size()
	}
	out[len(out)-1].names = lack.names
	return out
}

// pushing is one session.
type pushing struct {
	client  *Client
	group   group
	count   *counter
	workers int
	// later are the plain bytes of the sessions after this one.
	later int64
	id    string
	parts parts
	packs []writesession.Pack
}

// run opens a session, uploads and completes. In a later round, one that is still
// refused is given up.
func (p *pushing) run(ctx context.Context, round int) error {
	if err := p.open(ctx); err != nil {
		return err
	}
	err := p.fill(ctx)
	if err == nil {
		err = p.complete(ctx)
	}
	if err != nil && (ctx.Err() != nil || !resumable(err) || (round > 1 && refused(err))) {
		p.abort(ctx)
	}
	return err
}

// refused reports whether the service has found something wrong with what arrived.
func refused(err error) bool {
	var problem *ProblemError
	return errors.As(err, &problem) && problem.Type == writesession.ProblemUnproven
}

// resumable reports whether the same Push may go on later with what has arrived.
func resumable(err error) bool {
	var problem *ProblemError
	var upload *UploadError
	var unreachable *UnreachableError
	switch {
	case errors.As(err, &problem):
		return problem.passing() || refused(err) || problem.Status == http.StatusUnauthorized ||
			problem.Type == writesession.ProblemStoreDenied || problem.Type == writesession.ProblemNotOpen
	case errors.As(err, &upload):
		return true
	default:
		return errors.As(err, &unreachable)
	}
}

// fill brings the chunks that the store lacks.
func (p *pushing) fill(ctx context.Context) error {
	var err error
	if p.parts, err = p.client.parts(ctx, p.group.blobs, map[blob.Digest]bool{}, p.count); err != nil {
		return err
	}
	var size int64
	for _, chunk := range p.parts.need {
		size += chunk.size
	}
	p.count.expect(size + p.later)
	return p.upload(ctx)
}

func (p *pushing) complete(ctx context.Context) error {
	request := writesession.CompleteRequest{Packs: p.packs, Blobs: p.parts.manifests, Names: []writesession.Artifact{}}
	var stored int64
	for _, pack := range p.packs {
		stored += pack.Size
	}
	for _, name := range p.group.names {
		request.Names = append(request.Names, writesession.Artifact{Artifact: name.Artifact, Name: name})
	}
	// The service reads all of it back before it answers.
	const (
		atLeast   = 2 * time.Minute
		perSecond = 4 << 20
	)
	_, sent, err := p.client.do(ctx, call{
		what: "complete the write session", method: http.MethodPost, path: p.path("/complete"), body: request,
		within: atLeast + time.Duration(stored/perSecond)*time.Second,
	})
	p.count.sent(sent)
	if err != nil {
		return p.named(err)
	}
	p.count.change(func(result *PushResult) {
		result.Blobs += len(request.Blobs)
		result.Names += len(request.Names)
		result.Chunks += len(p.parts.need)
		result.ChunksDeduped += p.parts.chunks - len(p.parts.need)
		for _, chunk := range p.parts.need {
			result.BytesPlain += chunk.size
		}
	})
	return nil
}

// named says of a refused blob what it is called here.
func (p *pushing) named(err error) error {
	var problem *ProblemError
	if !errors.As(err, &problem) {
		return err
	}
	names := map[string]string{}
	for _, offered := range p.group.blobs {
		names[string(offered.Source.Digest())] = offered.Source.Name()
	}
	for i, object := range problem.Objects {
		if name := names[object.Name]; name != "" {
			problem.Objects[i].Name = name
		}
	}
	return err
}

// abort takes the session back, which frees what was uploaded. It does not mend
// the error for which it is called, so its own is dropped: the session runs out.
func (p *pushing) abort(ctx context.Context) {
	const soon = 5 * time.Second
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), soon)
	defer cancel()
	_, _, _ = p.client.once(ctx, call{what: "abort the write session", method: http.MethodDelete, path: p.path(""), within: soon}, nil)
}

func (p *pushing) path(rest string) string {
	return p.client.site("/write-sessions/" + url.PathEscape(p.id) + rest)
}

// localError is an error of this computer, such as a file that cannot be read.
func localError(doing, name string, err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return plan.WithHint(fmt.Errorf("%s %s: %w", doing, name, err),
		"make sure that %s can be read, or build it again; then run the same command", name)
}
