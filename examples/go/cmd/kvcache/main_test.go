package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"example.org/kvferry"
)

func TestProgramComparesFiveWays(t *testing.T) {
	f := quickFlags(t)
	var out bytes.Buffer
	if err := run(context.Background(), f, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"prefill again", "keep sequences in place", "llama.cpp", "kvferry", "hit rate", "MiB"} {
		if !strings.Contains(out.String(), word) {
			t.Errorf("the table lacks %q:\n%s", word, out.String())
		}
	}
	var figures report
	text := readJSON(t, f.json, &figures)
	if len(figures.Rows) != 5 || figures.Check.States == 0 || figures.Check.Identical != figures.Check.States {
		t.Errorf("%s", text)
	}
	inPlace, llamaCpp, ours := figures.Rows[1], figures.Rows[2], figures.Rows[3]
	if inPlace.Hits == 0 || inPlace.Hits+inPlace.Misses != f.Turns || inPlace.LoadedBytes != 0 {
		t.Errorf("%+v", inPlace)
	}
	for _, row := range []row{llamaCpp, ours} {
		if row.FoundP50 <= 0 || row.HeldP50 <= 0 || row.HeldP50 > max(row.LoadP50, row.SaveP50) {
			t.Errorf("a time is missing: %+v", row)
		}
		if row.Hits+row.Misses != f.Turns || row.Hits == 0 || row.SavedBytes < row.LoadedBytes || row.LoadedBytes == 0 {
			t.Errorf("%+v", row)
		}
	}
	if prefilled := figures.Rows[0].Prefilled; prefilled <= inPlace.Prefilled || prefilled <= ours.Prefilled {
		t.Errorf("%d tokens prefilled again, %d in place, %d by kvferry", prefilled, inPlace.Prefilled, ours.Prefilled)
	}
}

// readJSON reads the figures of a run, and returns the text too.
func readJSON(t *testing.T, path string, figures *report) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, figures)
	}
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestSmallBudgetStillGivesATable(t *testing.T) {
	f := quickFlags(t)
	f.Budget = 1
	var out bytes.Buffer
	if err := run(context.Background(), f, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"kvferry", "0 %", "No state"} {
		if !strings.Contains(out.String(), word) {
			t.Errorf("it does not say %q:\n%s", word, out.String())
		}
	}
}

// holdWith holds the turns in the way with a name, and calls progress after each turn.
func holdWith(t *testing.T, f flags, name string, progress func(*kvferry.Engine)) (result row) {
	t.Helper()
	engine, err := newEngine(f.Budget)
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	for _, w := range ways(engine, f.settings) {
		if w.name != name {
			continue
		}
		if err := withRun(context.Background(), f, w, func(int) { progress(engine) }, func(_ *runner, r row) error {
			result = r
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return result
}

func TestEvictionsDoNotDependOnTheClock(t *testing.T) {
	f := quickFlags(t)
	f.Conversations, f.Sequences, f.Turns = 6, 3, 24
	first := holdWith(t, f, "kvferry", func(*kvferry.Engine) {})
	if first.Evictions == 0 || first.Hits == 0 {
		t.Fatalf("the test has lost its point: %+v", first)
	}
	for _, name := range []string{"kvferry", "llama.cpp"} {
		r := holdWith(t, f, name, func(*kvferry.Engine) { time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond) })
		if r.Hits != first.Hits || r.Evictions != first.Evictions || r.SavedBytes != first.SavedBytes || r.LoadedBytes != first.LoadedBytes {
			t.Errorf("%s:\n%+v\nat first:\n%+v", name, r, first)
		}
	}
}

func TestBudgetBoundsWhatThePoolMaps(t *testing.T) {
	f := quickFlags(t)
	f.Turns = 24
	most := int64(0)
	r := holdWith(t, f, "kvferry", func(engine *kvferry.Engine) {
		var state struct{ Pool struct{ Mapped int64 } }
		text, err := engine.Describe()
		if err == nil {
			err = json.Unmarshal(text, &state)
		}
		if err != nil {
			t.Error(err)
		}
		most = max(most, state.Pool.Mapped)
	})
	if most > f.Budget || most < f.Budget/2 || r.Evictions == 0 {
		t.Errorf("%d bytes mapped of %d; %+v", most, f.Budget, r)
	}
}

// The context ends, as SIGINT ends it, in the middle of kvferry's turns.
func TestInterruptedProgramWritesNothing(t *testing.T) {
	f := quickFlags(t)
	f.Turns, f.Generate = 12, 12
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
