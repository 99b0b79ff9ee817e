package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestProgramComparesThreeWays(t *testing.T) {
	f := quickFlags(t)
	var out bytes.Buffer
	if err := run(context.Background(), f, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"prefill again", "llama.cpp", "kvferry", "hit rate", "MiB"} {
		if !strings.Contains(out.String(), word) {
			t.Errorf("the table lacks %q:\n%s", word, out.String())
		}
	}
	text, err := os.ReadFile(f.json)
	if err != nil {
		t.Fatal(err)
	}
	var figures report
	if err := json.Unmarshal(text, &figures); err != nil {
		t.Fatal(err)
	}
	if len(figures.Rows) != 3 || figures.Check.States == 0 || figures.Check.Identical != figures.Check.States {
		t.Errorf("%s", text)
	}
	for _, row := range figures.Rows[1:] {
		if row.FoundP50 <= 0 || row.HeldP50 <= 0 || row.HeldP50 > max(row.LoadP50, row.SaveP50) {
			t.Errorf("a time is missing: %+v", row)
		}
		if row.Hits+row.Misses != f.Turns || row.Hits == 0 || row.SavedBytes < row.LoadedBytes || row.LoadedBytes == 0 {
			t.Errorf("%+v", row)
		}
	}
}

// As SIGINT does it: the context ends, here in the middle of kvferry's turns.
func TestInterruptedProgramWritesNothing(t *testing.T) {
	f := quickFlags(t)
	f.Turns, f.Generate = 20, 30
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := run(ctx, f, io.Discard, whenWritten{"kvferry", cancel}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(f.json)); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
}

// whenWritten calls a function a moment after a text has been written.
type whenWritten struct {
	text string
	do   func()
}

func (w whenWritten) Write(p []byte) (int, error) {
	if strings.HasPrefix(string(p), w.text) {
		time.AfterFunc(50*time.Millisecond, w.do)
	}
	return len(p), nil
}

func TestFileThatCannotBeWrittenIsRefusedAtOnce(t *testing.T) {
	f := quickFlags(t)
	f.json = "/nowhere/figures.json"
	nothing := whenWritten{"", func() { t.Error("it has begun") }}
	if err := run(context.Background(), f, io.Discard, nothing); err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("got %v", err)
	}
}

func TestWrongArgumentsAreRefused(t *testing.T) {
	for _, arguments := range []string{"-sequences 0", "-budget -1", "-turns x", "more", "-nonsense"} {
		var said bytes.Buffer
		if _, err := parse(strings.Fields(arguments), &said); err == nil || said.Len() == 0 {
			t.Errorf("%s: %v, %q", arguments, err, said.String())
		}
	}
}
