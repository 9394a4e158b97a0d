package command

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/sitehost/collect"
	"github.com/nomad-site/site/internal/sitehost/pull"
	"github.com/nomad-site/site/internal/sitehost/serve"
)

func storeCommand(options Options) *cobra.Command {
	var folder string
	command := &cobra.Command{Use: "store", Short: "What the host's store holds, keeps and may lose"}
	command.PersistentFlags().StringVar(&folder, "store", serve.DefaultStore, "folder of the store")
	command.AddCommand(storeStatusCommand(options, &folder), storeRefreshCommand(), storeKeepCommand(options, &folder), storeCollectCommand(options, &folder))
	return command
}

func withStore(folder string, use func(*blob.Store) error) (err error) {
	store, err := blob.OpenStore(folder)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	return use(store)
}

// storeStatus is what a host says of its store.
type storeStatus struct {
	Names []storedName `json:"names"`
	Blobs int          `json:"blobs"`
	Bytes int64        `json:"bytes"`
	// Free is what the disk has left.
	Free int64 `json:"bytes_free"`
	// KeepList says whether the host knows what it must keep.
	KeepList bool `json:"keep_list"`
	// Serving is set where the server answers; KeyGeneration is that of the keys with
	// which it reads the object store, 0 where it has none.
	Serving       bool `json:"serving"`
	KeyGeneration int  `json:"key_generation"`
}

type storedName struct {
	Site     string      `json:"site"`
	Artifact string      `json:"artifact"`
	Digest   blob.Digest `json:"digest"`
	Size     int64       `json:"size"`
	Platform bool        `json:"platform"`
	Kept     bool        `json:"kept"`
}

func storeStatusCommand(options Options, folder *string) *cobra.Command {
	var server string
	command := &cobra.Command{
		Use: "status", Short: "Print what the store holds, and with which keys the server pulls", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			return withStore(*folder, func(store *blob.Store) error {
				status, err := statusOf(store)
				if err != nil {
					return err
				}
				if status.KeyGeneration, err = keyGeneration(command.Context(), server); err == nil {
					status.Serving = true
				}
				return options.print(status)
			})
		},
	}
	command.Flags().StringVar(&server, "server", serve.DefaultListen, "address of the server")
	return command
}

func statusOf(store *blob.Store) (storeStatus, error) {
	status := storeStatus{Names: []storedName{}}
	kept, there, err := collect.ReadList(collect.ListPath(store.Dir()))
	if err != nil {
		return status, err
	}
	status.KeepList = there
	names, err := store.Names()
	if err != nil {
		return status, err
	}
	for _, name := range names {
		status.Names = append(status.Names, storedName{
			Site: name.Site, Artifact: name.Artifact, Digest: name.Digest, Size: name.Size, Platform: name.Platform,
			Kept: name.Platform || kept[name.String()],
		})
	}
	blobs, err := store.Blobs()
	if err != nil {
		return status, err
	}
	for _, digest := range blobs {
		// One that was removed meanwhile is none.
		if size, err := store.Size(digest); err == nil {
			status.Blobs++
			status.Bytes += size
		}
	}
	status.Free, err = collect.Free(store.Dir())
	return status, err
}

// keyGeneration asks the server for the generation of the keys that it uses.
func keyGeneration(ctx context.Context, server string) (int, error) {
	const limit, longest = 5 * time.Second, 4 << 20
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+server+"/metrics", nil)
	if err != nil {
		return 0, fmt.Errorf("ask the server: %w", err)
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		return 0, fmt.Errorf("ask the server: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("ask the server: status %d", response.StatusCode)
	}
	lines := bufio.NewScanner(io.LimitReader(response.Body, longest))
	for lines.Scan() {
		text, found := strings.CutPrefix(lines.Text(), pull.GenerationMetric+" ")
		if !found {
			continue
		}
		generation, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return 0, fmt.Errorf("ask the server: %w", err)
		}
		return int(generation), nil
	}
	return 0, lines.Err()
}

func storeRefreshCommand() *cobra.Command {
	var server string
	command := &cobra.Command{
		Use: "refresh", Short: "Have the server read the keys of the object store anew", Args: cobra.NoArgs,
		Long: "The server reads them every minute and when they are refused; this does so now.",
		RunE: func(command *cobra.Command, _ []string) error { return refreshKeys(command.Context(), server) },
	}
	command.Flags().StringVar(&server, "server", serve.DefaultListen, "address of the server")
	return command
}

func refreshKeys(ctx context.Context, server string) error {
	const limit, longest = 40 * time.Second, 1 << 10
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+server+serve.RefreshPath, nil)
	if err != nil {
		return fmt.Errorf("ask the server: %w", err)
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		return fmt.Errorf("ask the server: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusNoContent {
		said, _ := io.ReadAll(io.LimitReader(response.Body, longest))
		return fmt.Errorf("ask the server: status %d: %s", response.StatusCode, strings.TrimSpace(string(said)))
	}
	return nil
}

func storeKeepCommand(options Options, folder *string) *cobra.Command {
	return &cobra.Command{
		Use: "keep", Short: "Replace the list of what is never removed by standard input", Args: cobra.NoArgs,
		Long: "Reads {\"names\": [\"site/artifact@sha256:…\"]} on standard input. All else may go when the disk is full.",
		RunE: func(*cobra.Command, []string) error {
			// The folder above it is there with the store.
			return withStore(*folder, func(store *blob.Store) error {
				names, err := collect.WriteList(collect.ListPath(store.Dir()), options.Stdin)
				if err != nil {
					return err
				}
				return options.print(map[string]int{"names": names})
			})
		},
	}
}

func storeCollectCommand(options Options, folder *string) *cobra.Command {
	var chosen collect.Options
	podman := collect.Podman{Command: []string{"podman"}, Registry: serve.DefaultListen}
	command := &cobra.Command{
		Use: "collect", Short: "Remove artifacts that are not kept, and podman's copies of them", Args: cobra.NoArgs,
		Long: "Removes names that are neither on the list of what is kept nor of the platform, the oldest first, blobs that no\n" +
			"name lists, and podman's copies that no container uses. Prints each with the reason. Without a list nothing goes.",
		RunE: func(command *cobra.Command, _ []string) error {
			return withStore(*folder, func(store *blob.Store) error {
				chosen.Store, chosen.List = store, collect.ListPath(store.Dir())
				result, err := collect.Run(command.Context(), chosen)
				if err == nil {
					err = podman.Images(command.Context(), &result, chosen.List)
				}
				return errors.Join(err, options.print(result))
			})
		},
	}
	command.Flags().BoolVar(&chosen.DryRun, "dry-run", false, "remove nothing, print what would be")
	command.Flags().Int64Var(&chosen.MaxBytes, "max-bytes", 0, "stop once the blobs take no more than this (0: remove all that is not kept)")
	return command
}
