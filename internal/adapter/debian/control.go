package debian

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strings"
)

// paragraph is one stanza of a control file, as in a dpkg status or a package
// index. Field names are kept as they are written.
type paragraph map[string]string

// readParagraphs calls each with every stanza. Continuation lines are joined
// with line ends kept.
func readParagraphs(source io.Reader, each func(paragraph) error) error {
	reader := bufio.NewReaderSize(source, 1<<16)
	current, last, number := paragraph{}, "", 0
	emit := func() error {
		if len(current) == 0 {
			return nil
		}
		done := current
		current, last = paragraph{}, ""
		return each(done)
	}
	for {
		line, err := reader.ReadString('\n')
		if err != nil && err != io.EOF {
			return err
		}
		number++
		text := strings.TrimRight(line, "\r\n")
		switch {
		case strings.TrimSpace(text) == "":
			if err := emit(); err != nil {
				return err
			}
		case text[0] == ' ' || text[0] == '\t':
			if last == "" {
				return fmt.Errorf("line %d continues no field", number)
			}
			current[last] += "\n" + text
		default:
			name, value, found := strings.Cut(text, ":")
			if !found || name == "" {
				return fmt.Errorf("line %d is not a field: %q", number, text)
			}
			if _, twice := current[name]; twice {
				return fmt.Errorf("line %d gives %s again", number, name)
			}
			current[name], last = strings.TrimSpace(value), name
		}
		if err == io.EOF {
			return emit()
		}
	}
}

// Installed reads a dpkg status: the versions of all packages that are installed.
func Installed(status []byte) (map[string]string, error) {
	versions := map[string]string{}
	err := readParagraphs(bytes.NewReader(status), func(stanza paragraph) error {
		name := stanza["Package"]
		if name == "" {
			return fmt.Errorf("a stanza has no Package")
		}
		if strings.HasSuffix(stanza["Status"], " installed") {
			versions[name] = stanza["Version"]
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("parse dpkg status: %w", err)
	}
	return versions, nil
}

// statusFields are what apt needs of an installed package to resolve against it.
// It takes a package whose dependencies or size differ from the index for
// another build of the version, and would install it anew.
var statusFields = []string{
	"Package", "Version", "Architecture", "Multi-Arch", "Essential", "Priority", "Installed-Size", "Provides",
	"Depends", "Pre-Depends", "Recommends", "Suggests", "Enhances", "Conflicts", "Breaks", "Replaces",
}

// providedSuffix makes a package that counts as there newer than any index has
// it, so that apt leaves it alone.
const providedSuffix = "+provided"

// installedStanza renders a package of an index as installed.
func installedStanza(stanza paragraph) string {
	var text strings.Builder
	for _, field := range statusFields {
		if value := stanza[field]; value != "" {
			fmt.Fprintf(&text, "%s: %s\n", field, value)
		}
	}
	text.WriteString("Status: install ok installed\nMaintainer: none\nDescription: none\n\n")
	return text.String()
}

// providedStanza renders a package that satisfies others and asks for nothing.
func providedStanza(stanza paragraph) string {
	return installedStanza(paragraph{
		"Package": stanza["Package"], "Version": stanza["Version"] + providedSuffix, "Architecture": stanza["Architecture"],
		"Multi-Arch": stanza["Multi-Arch"], "Provides": stanza["Provides"],
	})
}
