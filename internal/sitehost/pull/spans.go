package pull

import (
	"cmp"
	"errors"
	"slices"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	// widestGap is what is read and thrown away to save a request.
	widestGap = 128 << 10
	// The bounds of one request: bytes are proven as they come, so that long ones
	// cost no memory, but many short ones run side by side.
	shortestSpan = 1 << 20
	longestSpan  = 8 << 20
)

// piece is one chunk in a pack.
type piece struct {
	digest         blob.Digest
	size           int64 // of the plain bytes
	offset, length int64
}

// span is what one request reads: chunks of one pack, by their offsets.
type span struct {
	pack   blob.Digest
	pieces []piece
}

func (s span) end() int64 {
	last := s.pieces[len(s.pieces)-1]
	return last.offset + last.length
}

// spansOf gives the requests that bring the missing chunks of a record that is
// valid, so long that about as many as run at once have something to do.
func spansOf(record writesession.Record, missing []blob.Digest, parallel int) ([]span, error) {
	wanted := make(map[blob.Digest]bool, len(missing))
	for _, digest := range missing {
		wanted[digest] = true
	}
	byPack := make([][]piece, len(record.Packs))
	var total int64
	for i, chunk := range record.Manifest.Chunks {
		if !wanted[chunk.Digest] {
			continue
		}
		delete(wanted, chunk.Digest) // each once
		place := record.Places[i]
		byPack[place.Pack] = append(byPack[place.Pack], piece{chunk.Digest, chunk.Size, place.Offset, place.Length})
		total += place.Length
	}
	if len(wanted) > 0 {
		return nil, errors.New("a chunk is missing that the record does not have")
	}
	limit := min(max(total/int64(max(parallel, 1)), shortestSpan), longestSpan)
	var spans []span
	for i, pieces := range byPack {
		spans = append(spans, join(record.Packs[i], pieces, limit)...)
	}
	return spans, nil
}

// join makes spans of the chunks of one pack.
func join(pack blob.Digest, pieces []piece, limit int64) []span {
	slices.SortFunc(pieces, func(a, b piece) int { return cmp.Compare(a.offset, b.offset) })
	var spans []span
	for _, next := range pieces {
		if last := len(spans) - 1; last >= 0 {
			// Chunks that overlap are read by themselves: both cannot be true.
			gap := next.offset - spans[last].end()
			if gap >= 0 && gap <= widestGap && next.offset+next.length-spans[last].pieces[0].offset <= limit {
				spans[last].pieces = append(spans[last].pieces, next)
				continue
			}
		}
		spans = append(spans, span{pack: pack, pieces: []piece{next}})
	}
	return spans
}
