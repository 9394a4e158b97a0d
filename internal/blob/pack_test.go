package blob

import (
	"bytes"
	"errors"
	"testing"
)

func TestAPackedChunkIsWhatAStoreTakes(t *testing.T) {
	packer, err := NewPacker(2)
	if err != nil {
		t.Fatal(err)
	}
	defer packer.Close()
	for _, test := range []struct {
		name  string
		plain []byte
	}{
		{"text", text(MaxChunkSize, 1)},
		{"one byte", []byte("x")},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := []byte("what lies before it in a pack")
			packed, err := packer.Pack(DigestOf(test.plain), test.plain, before)
			if err != nil || !bytes.HasPrefix(packed, before) {
				t.Fatalf("%d bytes, %v", len(packed), err)
			}
			packed = packed[len(before):]
			if len(packed) > MaxPackedChunk {
				t.Errorf("%d bytes", len(packed))
			}
			if err := openStore(t).PutChunk(DigestOf(test.plain), packed); err != nil {
				t.Error(err)
			}
			again, err := packer.Pack(DigestOf(test.plain), test.plain, nil)
			if err != nil || !bytes.Equal(packed, again) {
				t.Errorf("the same chunk gives other bytes, %v", err)
			}
		})
	}
	var mismatch *MismatchError
	if out, err := packer.Pack(DigestOf(nil), []byte("x"), nil); !errors.As(err, &mismatch) || len(out) != 0 {
		t.Errorf("a wrong byte: %d bytes, %v", len(out), err)
	}
}
