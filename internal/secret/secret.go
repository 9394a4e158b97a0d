// Package secret holds values that must never be shown by accident.
package secret

import (
	"fmt"
	"log/slog"
)

const redacted = "[redacted]"

// Value is a secret that prints as "[redacted]" in fmt, slog, JSON, text
// encodings and panics. Only Reveal gives the content.
type Value struct{ content *string }

// New wraps content.
func New(content string) Value { return Value{content: &content} }

// Reveal returns the content; the empty string for the zero Value.
func (v Value) Reveal() string {
	if v.content == nil {
		return ""
	}
	return *v.content
}

// IsZero reports whether the value was never set or is empty.
func (v Value) IsZero() bool { return v.Reveal() == "" }

// String implements fmt.Stringer.
func (Value) String() string { return redacted }

// GoString implements fmt.GoStringer, for %#v.
func (Value) GoString() string { return redacted }

// Format implements fmt.Formatter, so that no verb reaches the content.
func (Value) Format(state fmt.State, _ rune) { _, _ = state.Write([]byte(redacted)) }

// LogValue implements slog.LogValuer.
func (Value) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON implements json.Marshaler.
func (Value) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText implements encoding.TextMarshaler, which HCL and YAML encoders use too.
func (Value) MarshalText() ([]byte, error) { return []byte(redacted), nil }
