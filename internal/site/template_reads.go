package site

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/template/parse"

	"github.com/hashicorp/hcl/v2"
)

// secretCall is one call in a template that asks for a secret.
type secretCall struct {
	function string
	// path is the argument as written; literal is false where it is computed.
	path    string
	literal bool
	// argument is what is written there; nil where it is computed.
	argument *parse.StringNode
	// writes says that there are more arguments: values to write.
	writes bool
	// offset is that of word, which stands for the call in a diagnostic.
	offset int
	word   string
	place  hcl.Range
}

// secretFunctions are the template functions that talk to OpenBao.
var secretFunctions = []string{"secret", "secrets", "pkiCert"}

// parseLine takes the line out of an error of text/template/parse.
var parseLine = regexp.MustCompile(`^template: template:(\d+):\s*(.*)$`)

// calls finds the calls for secrets in a template, in its branches and in the
// templates that it defines.
func (t *templateText) calls(p *problems) []secretCall {
	text := t.text.String()
	calls, err := secretCalls(text, t.left, t.right)
	if err != nil {
		t.unreadable(text, err, p)
		return nil
	}
	for i := range calls {
		calls[i].place = t.place(calls[i].offset, calls[i].word)
	}
	return calls
}

// secretCalls are those of a text, in the order in which they stand there.
func secretCalls(text, left, right string) ([]secretCall, error) {
	trees := map[string]*parse.Tree{}
	tree := parse.New("template")
	tree.Mode = parse.SkipFuncCheck
	if _, err := tree.Parse(text, left, right, trees); err != nil {
		return nil, err
	}
	w := &callWalker{}
	for _, tree := range trees {
		w.node(tree.Root)
	}
	slices.SortFunc(w.calls, func(a, b secretCall) int { return cmp.Compare(a.offset, b.offset) })
	return w.calls, nil
}

// unreadable reports a template that does not parse. With parts that only the
// server can evaluate it may still be right, which matters where it reads secrets.
func (t *templateText) unreadable(text string, err error, p *problems) {
	line, detail := 1, strings.TrimPrefix(err.Error(), "template: ")
	if match := parseLine.FindStringSubmatch(err.Error()); match != nil {
		// More digits than a number has leave it at the first line.
		if number, err := strconv.Atoi(match[1]); err == nil {
			line = number
		}
		detail = match[2]
	}
	offset := 0
	for range line - 1 {
		end := strings.IndexByte(text[offset:], '\n')
		if end < 0 {
			break
		}
		offset += end + 1
	}
	switch {
	case !t.partial:
		p.add(t.place(offset, ""), "Invalid template", "%s.", detail)
	case strings.Contains(text, "secret"):
		p.add(t.place(offset, ""), "Unreadable template", "What it reads must be known before the job is evaluated, so that the policy can be derived from it: keep ${…} and %%{…} out of the template's own actions (%s).", detail)
	}
}

type callWalker struct {
	calls []secretCall
}

func (w *callWalker) node(node parse.Node) {
	switch n := node.(type) {
	case *parse.ListNode:
		if n == nil {
			return
		}
		for _, child := range n.Nodes {
			w.node(child)
		}
	case *parse.ActionNode:
		w.pipe(n.Pipe)
	case *parse.IfNode:
		w.branch(&n.BranchNode)
	case *parse.RangeNode:
		w.branch(&n.BranchNode)
	case *parse.WithNode:
		w.branch(&n.BranchNode)
	case *parse.TemplateNode:
		w.pipe(n.Pipe)
	case *parse.PipeNode:
		w.pipe(n)
	case *parse.ChainNode:
		w.node(n.Node)
	}
}

func (w *callWalker) branch(b *parse.BranchNode) {
	w.pipe(b.Pipe)
	w.node(b.List)
	w.node(b.ElseList)
}

func (w *callWalker) pipe(pipe *parse.PipeNode) {
	if pipe == nil {
		return
	}
	for i, command := range pipe.Cmds {
		var piped *parse.CommandNode
		if i > 0 {
			piped = pipe.Cmds[i-1]
		}
		w.command(command, piped)
		for _, argument := range command.Args {
			w.node(argument)
		}
	}
}

// command looks at one call; piped is what comes to it as its last argument.
func (w *callWalker) command(command, piped *parse.CommandNode) {
	function, ok := command.Args[0].(*parse.IdentifierNode)
	if !ok || !slices.Contains(secretFunctions, function.Ident) {
		return
	}
	arguments := command.Args[1:]
	if piped != nil {
		arguments = append(slices.Clone(arguments), literalOf(piped))
	}
	call := secretCall{function: function.Ident, writes: len(arguments) > 1}
	word, position := function.Ident, function.Position()
	if len(arguments) > 0 {
		if text, ok := unwrap(arguments[0]).(*parse.StringNode); ok && !strings.Contains(text.Text, interpolated) {
			call.path, call.literal, call.argument = text.Text, true, text
			word, position = text.Text, text.Position()
		}
	}
	call.offset, call.word = int(position), word
	w.calls = append(w.calls, call)
}

// literalOf is the one literal that a command is, or the command.
func literalOf(command *parse.CommandNode) parse.Node {
	if len(command.Args) == 1 {
		return command.Args[0]
	}
	return command
}

// unwrap takes the parentheses off a lone literal.
func unwrap(node parse.Node) parse.Node {
	for {
		pipe, ok := node.(*parse.PipeNode)
		if !ok || len(pipe.Cmds) != 1 || len(pipe.Decl) > 0 || len(pipe.Cmds[0].Args) != 1 {
			return node
		}
		node = pipe.Cmds[0].Args[0]
	}
}
