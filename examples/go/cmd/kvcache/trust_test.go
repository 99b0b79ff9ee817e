package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"example.org/kvferry"
)

// The state was not saved by kvferry, and kvferry does not know the libllama's format: this libllama is a copy that begins
// its states with another number. A process holds one libllama, so the copy has a process of its own.
func TestAStateWithoutEnvelopeIsLoadedOnlyIfItIsTrusted(t *testing.T) {
	const variable = "KVFERRY_TEST_UNKNOWN_FORMAT"
	if os.Getenv(variable) == "" {
		folder := t.TempDir()
		writeUnknownFormat(t, folder, testLibrary())
		again := exec.Command(os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
		again.Env = append(os.Environ(), "KVFERRY_LLAMA_LIB="+folder, variable+"=1")
		output, err := again.CombinedOutput()
		if err != nil || !bytes.Contains(output, []byte("--- PASS: "+t.Name())) {
			t.Fatalf("%v: %s", err, output)
		}
		return
	}
	const envelope = 64
	_, f := newModel(t, 2, 100, 0)
	state := save(t, f, 0).Bytes()
	bare := kvferry.Bytes(state[:len(state)-envelope])
	if _, err := f.llama.Sequence(1).Load(context.Background(), bare); !errors.Is(err, kvferry.ErrStateDamaged) {
		t.Errorf("without trust: %v", err)
	}
	if _, err := f.llama.Sequence(1).Load(context.Background(), bare, kvferry.TrustState()); err != nil {
		t.Error(err)
	}
}

// writeUnknownFormat writes a copy of libllama with another `io_magic`, and links to the libraries that it needs.
func writeUnknownFormat(t *testing.T, folder, from string) {
	t.Helper()
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		t.Fatal(err)
	}
	from, _ = filepath.Abs(from)
	code, err := os.ReadFile(filepath.Join(from, "libllama.so"))
	if err != nil {
		t.Fatal(err)
	}
	magic := []byte{0xd8, 0x3c, 0x14, 0xaf}
	if !bytes.Contains(code, magic) {
		t.Skip("this libllama begins its states with no number")
	}
	code = bytes.ReplaceAll(code, magic, []byte{0xed, 0x5e, 0xed, 0x5e})
	if err := os.WriteFile(filepath.Join(folder, "libllama.so"), code, 0o644); err != nil {
		t.Fatal(err)
	}
	needed, err := filepath.Glob(filepath.Join(from, "libggml*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range needed {
		if err := os.Symlink(path, filepath.Join(folder, filepath.Base(path))); err != nil {
			t.Fatal(err)
		}
	}
}
