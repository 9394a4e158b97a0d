package nomad

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

const podmanLog = "2026-11-21T09:01:21.050622593+00:00 stdout F mode is exit\n" +
	"2026-11-21T09:01:21.050737845+00:00 stderr P no configuration\n" +
	"2026-11-21T09:01:21.050737845+00:00 stderr F  found\n" +
	"2026-11-21T09:01:21.050737845Z stdout F \n" +
	"a line of another driver\n"

func TestALogIsFreeOfPodmansMarks(t *testing.T) {
	const want = "mode is exit\nno configuration found\n\na line of another driver\n"
	for size := 1; size <= len(podmanLog); size += 7 {
		var out bytes.Buffer
		plain := &plainWriter{w: &out}
		for rest := podmanLog; rest != ""; rest = rest[min(size, len(rest)):] {
			if _, err := plain.Write([]byte(rest[:min(size, len(rest))])); err != nil {
				t.Fatal(err)
			}
		}
		if err := plain.flush(); err != nil || out.String() != want {
			t.Errorf("in pieces of %d: got %q (%v), want %q", size, out.String(), err, want)
		}
	}
}

func TestALogThatDoesNotEndIsShownToo(t *testing.T) {
	var out bytes.Buffer
	plain := &plainWriter{w: &out}
	if _, err := plain.Write([]byte("2026-11-21T09:01:21.0Z stdout F half a li")); err != nil {
		t.Fatal(err)
	}
	if err := plain.flush(); err != nil || out.String() != "half a li" {
		t.Errorf("got %q, %v", out.String(), err)
	}
}

func TestTheLastLinesNameTheirStream(t *testing.T) {
	got := lastLines(podmanLog, Stdout, 3)
	want := []logLine{{Stderr, "no configuration found"}, {Stdout, ""}, {Stdout, "a line of another driver"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := lastLines("plain\n", Stderr, 3); !slices.Equal(got, []logLine{{Stderr, "plain"}}) {
		t.Errorf("got %q", got)
	}
	if got := lastLines("\n", Stderr, 3); got != nil {
		t.Errorf("got %q", got)
	}
	cut := "2026-11-21T09:01:21.0Z stdout P " + strings.Repeat("x", 5)
	if got := lastLines(cut, Stdout, 3); !slices.Equal(got, []logLine{{Stdout, "xxxxx"}}) {
		t.Errorf("got %q", got)
	}
}
