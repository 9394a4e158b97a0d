package secret_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/secret"
)

func TestValueNeverShowsItsContent(t *testing.T) {
	const planted = "hunter2-planted"
	value := secret.New(planted)
	holder := struct {
		Name  string
		Value secret.Value
	}{"db", value}

	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "value", value, "holder", holder)
	asJSON, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	shown := []string{
		fmt.Sprint(value), fmt.Sprintf("%v %+v %#v %s %q %x %d", value, value, value, value, value, value, value),
		fmt.Sprintf("%v %+v %#v", holder, holder, holder), fmt.Sprintf("%#v", &holder), string(asJSON), log.String(),
	}
	for _, text := range shown {
		if strings.Contains(text, planted) || strings.Contains(text, fmt.Sprintf("%x", planted)) {
			t.Errorf("the content shows in %q", text)
		}
	}
	if value.Reveal() != planted {
		t.Errorf("Reveal gave %q", value.Reveal())
	}
}

func TestZeroValueIsEmpty(t *testing.T) {
	var value secret.Value
	if !value.IsZero() || value.Reveal() != "" {
		t.Error("the zero Value is not empty")
	}
}
