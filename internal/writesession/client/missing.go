package client

import (
	"context"
	"fmt"
	"net/http"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/writesession"
)

// chunksAtOnce bounds one question: a list of digests of about a megabyte.
const chunksAtOnce = 16384

// Missing asks the service what of the offer the store lacks; it writes nothing
// there. Chunk lists are only made of blobs that it lacks.
func (c *Client) Missing(ctx context.Context, offer blob.Offer) (blob.Report, error) {
	asked := &counter{}
	lack, err := c.lacking(ctx, offer, asked)
	if err != nil {
		return blob.Report{}, err
	}
	report := blob.Report{Names: lack.names, BytesOf: map[blob.Digest]int64{}}
	seen := map[blob.Digest]bool{}
	for _, offered := range lack.blobs {
		// One by one, for the lists of a big offer are not needed at the same time.
		digest := offered.Source.Digest()
		parts, err := c.parts(ctx, []blob.Offered{offered}, seen, asked)
		if err != nil {
			return blob.Report{}, err
		}
		report.Blobs = append(report.Blobs, digest)
		report.BytesTotal += offered.Source.Size()
		for _, chunk := range parts.need {
			report.Chunks++
			report.BytesToSend += chunk.size
			report.BytesOf[digest] += chunk.size
		}
	}
	return report, nil
}

// shortage is what of an offer the store lacks, in the order of the offer.
type shortage struct {
	blobs []blob.Offered
	names []blob.Name
}

func (s shortage) empty() bool { return len(s.blobs) == 0 && len(s.names) == 0 }

// lacking asks for names and blobs.
func (c *Client) lacking(ctx context.Context, offer blob.Offer, asked *counter) (shortage, error) {
	var request writesession.MissingRequest
	for _, name := range offer.Names {
		if err := name.Validate(); err != nil {
			return shortage{}, err
		}
		if name.Site != c.options.Site {
			return shortage{}, fmt.Errorf("%s: not of site %s, whose object store this is", name, c.options.Site)
		}
		if name.Platform {
			return shortage{}, plan.WithHint(fmt.Errorf("%s: belongs to the platform, which travels by SSH alone", name), "send it with --via=ssh")
		}
		request.Names = append(request.Names, writesession.Artifact{Artifact: name.Artifact, Name: name})
	}
	offered := map[blob.Digest]blob.Offered{}
	for _, one := range offer.Blobs {
		digest := one.Source.Digest()
		if _, twice := offered[digest]; !twice {
			offered[digest] = one
			request.Blobs = append(request.Blobs, digest)
		}
	}
	var out shortage
	if len(request.Blobs) == 0 && len(request.Names) == 0 {
		return out, nil
	}
	answer, err := c.ask(ctx, request, asked)
	if err != nil {
		return shortage{}, err
	}
	for _, digest := range answer.Blobs {
		one, known := offered[digest]
		if !known {
			return shortage{}, notAsked("blob", digest)
		}
		delete(offered, digest)
		out.blobs = append(out.blobs, one)
	}
	last := -1
	for _, i := range answer.Names {
		if i <= last || i >= len(offer.Names) {
			return shortage{}, notAsked("name", i)
		}
		last = i
		out.names = append(out.names, offer.Names[i])
	}
	return out, nil
}

func notAsked(kind string, what any) error {
	return strange("ask what is missing", "it lacks %s %v, which it was not asked for", kind, what)
}

func (c *Client) ask(ctx context.Context, request writesession.MissingRequest, asked *counter) (writesession.MissingResponse, error) {
	var answer writesession.MissingResponse
	_, sent, err := c.do(ctx, call{
		what: "ask what is missing", method: http.MethodPost, path: c.site("/missing"), body: request, into: &answer,
	})
	asked.sent(sent)
	return answer, err
}

// part is a chunk that travels, and where it is read.
type part struct {
	digest blob.Digest
	source blob.Source
	// blob counts the sources, which need not be comparable.
	blob         int
	offset, size int64
}

// parts are the chunk lists of some blobs, and which chunks of them travel.
type parts struct {
	manifests []blob.Manifest
	need      []part
	// chunks and total are the number and the length of all chunks, each counted once.
	chunks int
	total  int64
}

// parts cuts blobs into chunks and asks which the store lacks. A chunk that is in
// seen is left out, and others are added there.
func (c *Client) parts(ctx context.Context, blobs []blob.Offered, seen map[blob.Digest]bool, asked *counter) (parts, error) {
	var out parts
	var distinct []part
	for i, offered := range blobs {
		manifest, err := manifestOf(offered)
		if err != nil {
			return parts{}, err
		}
		out.manifests = append(out.manifests, manifest)
		var offset int64
		for _, chunk := range manifest.Chunks {
			if !seen[chunk.Digest] {
				seen[chunk.Digest] = true
				distinct = append(distinct, part{digest: chunk.Digest, source: offered.Source, blob: i, offset: offset, size: chunk.Size})
				out.total += chunk.Size
			}
			offset += chunk.Size
		}
	}
	out.chunks = len(distinct)
	for len(distinct) > 0 {
		batch := distinct[:min(len(distinct), chunksAtOnce)]
		distinct = distinct[len(batch):]
		need, err := c.lackingChunks(ctx, batch, asked)
		if err != nil {
			return parts{}, err
		}
		out.need = append(out.need, need...)
	}
	return out, nil
}

func (c *Client) lackingChunks(ctx context.Context, batch []part, asked *counter) ([]part, error) {
	var request writesession.MissingRequest
	at := make(map[blob.Digest]int, len(batch))
	for i, one := range batch {
		at[one.digest] = i
		request.Chunks = append(request.Chunks, one.digest)
	}
	answer, err := c.ask(ctx, request, asked)
	if err != nil {
		return nil, err
	}
	out := make([]part, 0, len(answer.Chunks))
	for _, digest := range answer.Chunks {
		i, known := at[digest]
		if !known {
			return nil, notAsked("chunk", digest)
		}
		delete(at, digest)
		out = append(out, batch[i])
	}
	return out, nil
}

func manifestOf(offered blob.Offered) (blob.Manifest, error) {
	if offered.Manifest == nil {
		return blob.ChunkSource(offered.Source)
	}
	source := offered.Source
	manifest, err := offered.Manifest()
	if err == nil {
		err = manifest.Validate()
	}
	if err != nil {
		return blob.Manifest{}, fmt.Errorf("chunk list of %s: %w", source.Name(), err)
	}
	if manifest.Digest != source.Digest() || manifest.Size != source.Size() {
		return blob.Manifest{}, fmt.Errorf("chunk list of %s: is of %s with %d bytes, want %s with %d",
			source.Name(), manifest.Digest, manifest.Size, source.Digest(), source.Size())
	}
	return manifest, nil
}
