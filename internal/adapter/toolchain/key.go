package toolchain

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"sort"
	"strings"
)

// recipe is raised whenever the way of building or unpacking changes, so that
// what an older site installed is made again.
const recipe = 1

// pin identifies everything in the catalogue that decides a tool's bytes for a
// platform. It needs no Go toolchain, so that a tool can be resolved without one.
func (t Tool) pin(platform Platform) string {
	digests := map[string]string{}
	for name, content := range t.files {
		digests[name] = digestOf(content)
	}
	identity := struct {
		Recipe     int
		Name       string
		Version    string
		Executable string
		Platform   string
		Arguments  []string          `json:",omitempty"`
		Files      map[string]string `json:",omitempty"`
		Source     *Source           `json:",omitempty"`
		Lock       string            `json:",omitempty"`
	}{Recipe: recipe, Name: t.Name, Version: t.Version, Executable: t.Executable, Platform: platform.String(), Files: digests}
	if t.Module != nil {
		identity.Arguments = t.buildArguments("")
	} else if source, ok := t.source(platform); ok {
		identity.Source = &source
		if source.lock != nil {
			identity.Lock = digestOf(source.lock)
		}
	}
	// A struct with sorted maps always encodes to the same bytes.
	encoded, err := json.Marshal(identity)
	if err != nil {
		panic(fmt.Sprintf("encode the pin of %s: %v", t.Name, err)) // only plain types above
	}
	return digestOf(encoded)
}

// key names the folder of an installed tool: its pin, and the builder's version
// of Go where one took part.
func key(pin, goVersion string) string {
	return digestOf([]byte(pin + "\n" + goVersion))[:16]
}

// buildArguments are the arguments of go that make the executable.
func (t Tool) buildArguments(output string) []string {
	linker := []string{"-s", "-w"}
	names := make([]string, 0, len(t.Module.Variables))
	for name := range t.Module.Variables {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		linker = append(linker, "-X", name+"="+t.Module.Variables[name])
	}
	arguments := []string{"build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", strings.Join(linker, " ")}
	if len(t.Module.Tags) > 0 {
		arguments = append(arguments, "-tags", strings.Join(t.Module.Tags, ","))
	}
	return append(arguments, "-o", output, t.Module.Package)
}

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}
