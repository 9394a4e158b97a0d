package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func environmentOf(values map[string]string) func(string) string {
	return func(name string) string { return values[name] }
}

func TestTheEnvironmentIsCheckedAsAWhole(t *testing.T) {
	var stderr bytes.Buffer
	code := start(t.Context(), nil, environmentOf(map[string]string{
		varSite: "gamma", varPathStyle: "perhaps", varListen: "0.0.0.0:7390", varOpenBao: "nowhere",
	}), &stderr, &stderr, nil)
	for _, want := range []string{varEndpoint, varBucket, varKeys, varPathStyle, "0.0.0.0:7390", varOpenBao, "hint: "} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("%q is not in %s", want, stderr.String())
		}
	}
	if code != 1 {
		t.Errorf("code %d", code)
	}
}

func TestItTellsItsVersionAndTakesNoArguments(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := start(t.Context(), []string{"--version"}, environmentOf(nil), &stdout, &stderr, nil); code != 0 || !strings.Contains(stdout.String(), version) {
		t.Errorf("code %d: %s%s", code, stdout.String(), stderr.String())
	}
	for _, arguments := range [][]string{{"serve"}, {"--unknown"}} {
		if code := start(t.Context(), arguments, environmentOf(nil), &stdout, &stderr, nil); code != 1 {
			t.Errorf("%q: code %d", arguments, code)
		}
	}
}

func TestTheKeysAreReadAgainWhenTheyChange(t *testing.T) {
	file := &keyFile{path: filepath.Join(t.TempDir(), "store_keys")}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file.path+".new", []byte(text), 0o400); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file.path+".new", file.path); err != nil {
			t.Fatal(err)
		}
	}
	want := func(refresh bool, id, key string) {
		t.Helper()
		gotID, gotKey, err := file.keys(context.Background(), refresh)
		if id == "" {
			if err == nil || strings.Contains(err.Error(), key) {
				t.Errorf("got %q, %v", gotID, err)
			}
			return
		}
		if err != nil || gotID != id || gotKey.Reveal() != key {
			t.Errorf("got %q, %v", gotID, err)
		}
	}
	want(false, "", "secret")
	write("first\n")
	want(false, "", "secret")
	write("first\nsecret-1\n")
	want(false, "first", "secret-1")
	want(false, "first", "secret-1")
	write("second of another length\nsecret-2\n")
	want(false, "", "secret-2")
	write("second\nsecret-2\n")
	want(false, "second", "secret-2")
	write("")
	want(true, "", "secret-2")
	write("second\nsecret-3\n")
	want(true, "second", "secret-3")
}
