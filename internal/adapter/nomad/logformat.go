package nomad

import (
	"bytes"
	"io"
	"regexp"
	"strings"
)

// podmanLine is how podman writes a line of a container for Nomad to collect:
// with time, stream and whether the line ends here (F) or goes on (P). Both
// streams come through Nomad's stdout then.
var podmanLine = regexp.MustCompile(`^\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|[+-]\d\d:\d\d) (stdout|stderr) ([FP]) ?`)

// unwrap takes what the task said out of a line of podman's; other lines stay.
func unwrap(line string, from Stream) (text string, of Stream, ends bool) {
	found := podmanLine.FindStringSubmatch(line)
	if found == nil {
		return line, from, true
	}
	return line[len(found[0]):], Stream(found[1]), found[2] == "F"
}

// plainWriter passes on what a task said, and nothing of podman's.
type plainWriter struct {
	w    io.Writer
	rest []byte
}

func (p *plainWriter) Write(content []byte) (int, error) {
	p.rest = append(p.rest, content...)
	var plain bytes.Buffer
	for {
		line, rest, whole := bytes.Cut(p.rest, []byte("\n"))
		if !whole {
			break
		}
		text, _, ends := unwrap(string(line), "")
		plain.WriteString(text)
		if ends {
			plain.WriteByte('\n')
		}
		p.rest = rest
	}
	p.rest = bytes.Clone(p.rest)
	if _, err := p.w.Write(plain.Bytes()); err != nil {
		return 0, err
	}
	return len(content), nil
}

// flush passes on a last line that does not end.
func (p *plainWriter) flush() error {
	text, _, _ := unwrap(string(p.rest), "")
	p.rest = nil
	_, err := io.WriteString(p.w, text)
	return err
}

// logLine is one line of a task, with the stream that it came from.
type logLine struct {
	stream Stream
	text   string
}

// lastLines are the last lines of a piece of log, those that podman cut made whole.
func lastLines(content string, from Stream, count int) []logLine {
	content = strings.ToValidUTF8(strings.TrimRight(content, "\n"), "\uFFFD")
	if content == "" {
		return nil
	}
	var lines []logLine
	open := map[Stream]*strings.Builder{}
	for line := range strings.SplitSeq(content, "\n") {
		text, stream, ends := unwrap(line, from)
		if open[stream] == nil {
			open[stream] = &strings.Builder{}
		}
		open[stream].WriteString(text)
		if ends {
			lines = append(lines, logLine{stream, open[stream].String()})
			open[stream].Reset()
		}
	}
	for _, stream := range []Stream{Stdout, Stderr} {
		if unfinished := open[stream]; unfinished != nil && unfinished.Len() > 0 {
			lines = append(lines, logLine{stream, unfinished.String()})
		}
	}
	return lines[max(0, len(lines)-count):]
}
