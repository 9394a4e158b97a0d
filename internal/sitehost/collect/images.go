package collect

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
)

// Image is one of podman's copies of an artifact, and its fate.
type Image struct {
	Name    string `json:"name"`
	Size    int64  `json:"size"`
	Removed bool   `json:"removed"`
	Reason  string `json:"reason"`
}

// Podman is how podman is called.
type Podman struct {
	// Command is the executable, with arguments before the verb.
	Command []string
	// Registry is where the host's own server is to podman: "127.0.0.1:7380".
	Registry string
}

// podmanImage is what `podman image ls --format json` says.
type podmanImage struct {
	ID          string   `json:"Id"`
	RepoTags    []string `json:"RepoTags"`
	RepoDigests []string `json:"RepoDigests"`
	Size        int64    `json:"Size"`
	Containers  int      `json:"Containers"`
}

// Images removes podman's copies of artifacts that the host no longer has and that
// no container uses. It comes behind Run, whose result it completes. A host
// without podman has none.
func (p Podman) Images(ctx context.Context, result *Result, list string) error {
	kept, there, err := ReadList(list)
	if err != nil || !there {
		return err
	}
	if _, err := exec.LookPath(p.Command[0]); errors.Is(err, exec.ErrNotFound) {
		return nil
	}
	sites := map[string]bool{}
	for name := range kept {
		site, _, _ := strings.Cut(name, "/")
		sites[site] = true
	}
	for _, one := range result.Artifacts {
		sites[one.Site] = true
		if !one.Removed {
			kept[one.Name()] = true
		}
	}
	return p.sweep(ctx, result, kept, sites)
}

func (p Podman) sweep(ctx context.Context, result *Result, kept, sites map[string]bool) error {
	output, err := p.run(ctx, "image", "ls", "--format", "json")
	if err != nil {
		return err
	}
	var images []podmanImage
	if err := json.Unmarshal(output, &images); err != nil {
		return fmt.Errorf("podman image ls: decode: %w", err)
	}
	seen := map[string]bool{}
	for _, image := range images {
		if seen[image.ID] { // an image has a line for each of its names
			continue
		}
		seen[image.ID] = true
		names, ours := p.names(image, sites)
		if !ours {
			continue
		}
		fate := Image{Name: names[0], Size: image.Size}
		switch {
		case slices.ContainsFunc(names, func(name string) bool { return kept[name] }):
			fate.Reason = "the host keeps the artifact"
		case image.Containers > 0:
			fate.Reason = "a container uses it"
		case result.DryRun:
			fate.Removed, fate.Reason = true, "the host has the artifact no more"
		default:
			// Not by force: podman refuses where a container was started meanwhile.
			_, err := p.run(ctx, "image", "rm", image.ID)
			fate.Removed, fate.Reason = err == nil, "the host has the artifact no more"
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				fate.Reason = err.Error()
			}
		}
		result.Images = append(result.Images, fate)
	}
	return nil
}

// names gives the artifacts that an image is a copy of; ours is false where it is
// of none, or has another name beside.
func (p Podman) names(image podmanImage, sites map[string]bool) (names []string, ours bool) {
	if len(image.RepoTags) > 0 {
		return nil, false
	}
	for _, each := range image.RepoDigests {
		name, found := strings.CutPrefix(each, p.Registry+"/")
		site, _, _, err := splitName(name)
		if !found || err != nil || !sites[site] {
			return nil, false
		}
		names = append(names, name)
	}
	return names, len(names) > 0
}

func (p Podman) run(ctx context.Context, arguments ...string) ([]byte, error) {
	command := exec.CommandContext(ctx, p.Command[0], slices.Concat(p.Command[1:], arguments)...)
	var output, said bytes.Buffer
	command.Stdout, command.Stderr = &output, &said
	if err := command.Run(); err != nil {
		const longest = 500
		text := strings.TrimSpace(said.String())
		return nil, fmt.Errorf("podman %s: %w: %.*s", strings.Join(arguments[:2], " "), err, longest, text)
	}
	return output.Bytes(), nil
}
