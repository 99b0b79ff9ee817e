// Command kvcache holds more conversations than a llama.cpp context has sequences. In each turn it finds the state of the
// conversation in a cache, loads it while other sequences decode, and saves it again after the answer. The cache has a
// budget of bytes, and evicts the state that was used least recently.
//
// The same turns are held in four other ways: by prefilling again; without a cache, where each conversation stays in its
// sequence until another conversation needs the sequence; with the cache, but with llama.cpp's own blocking calls; and with
// a cache of blocks of conversations, of which only what is new is saved after a turn, and which conversations share where
// they begin alike. A table compares them.
//
// yzma decodes, on an unmodified libllama. kvferry saves and loads.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"example.org/kvferry"
)

type flags struct {
	settings
	library, model, json string
	threads              int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	f, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		os.Exit(2)
	}
	err = run(ctx, f, os.Stdout, os.Stderr)
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "kvcache: interrupted; nothing was written")
		os.Exit(130)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kvcache:", err)
		os.Exit(1)
	}
}

func parse(arguments []string, out io.Writer) (f flags, err error) {
	set := flag.NewFlagSet("kvcache", flag.ContinueOnError)
	set.SetOutput(out)
	var budget float64
	set.IntVar(&f.Conversations, "conversations", 12, "how many `conversations` there are")
	set.IntVar(&f.Sequences, "sequences", 4, "how many `sequences` the context has, and turns at a time")
	set.IntVar(&f.Turns, "turns", 40, "`turns` of all conversations together")
	set.IntVar(&f.System, "system", 256, "`tokens` that all conversations begin with, a system prompt")
	set.IntVar(&f.Prompt, "prompt", 256, "`tokens` that follow them in the first turn, on average")
	set.IntVar(&f.User, "user", 24, "`tokens` of every later turn")
	set.IntVar(&f.Generate, "generate", 16, "`tokens` of every answer")
	set.IntVar(&f.Block, "block", 256, "`tokens` of a block, at most")
	set.Float64Var(&budget, "budget", 24, "`MiB` of states that the cache may hold")
	set.Uint64Var(&f.Seed, "seed", 1, "`number` that decides who says what when")
	set.IntVar(&f.threads, "threads", max(1, runtime.NumCPU()/2), "`threads` that decode; llama.cpp's wait for each other by spinning, so leave cores for the transfers")
	set.StringVar(&f.library, "llama-lib", cmp.Or(os.Getenv("KVFERRY_LLAMA_LIB"), "../../build/llama"), "`folder` of libllama.so")
	set.StringVar(&f.model, "model", "../../build/models/kvcache.gguf", "GGUF `file`; its vocabulary is used at random")
	set.StringVar(&f.json, "json", "", "`file` for all figures; - is the standard output, instead of the table")
	set.Usage = func() {
		fmt.Fprintln(out, "kvcache: conversations that share few sequences of llama.cpp, their states kept by kvferry")
		set.PrintDefaults()
	}
	if err := set.Parse(arguments); err != nil {
		return f, err
	}
	f.Budget = max(1, int64(budget*(1<<20))) // 0 would be no limit
	if set.NArg() > 0 || min(f.Conversations, f.Sequences, f.Turns, f.Prompt, f.User, f.Generate, f.Block, f.threads) < 1 || f.System < 0 || budget <= 0 {
		err := errors.New("every number must be at least 1 (-system 0), and there are no other arguments")
		fmt.Fprintln(out, "kvcache:", err)
		return f, err
	}
	return f, nil
}

func run(ctx context.Context, f flags, out, progress io.Writer) error {
	if folder := filepath.Dir(f.json); f.json != "" { // before all the work rather than after it
		if info, err := os.Stat(folder); err != nil || !info.IsDir() {
			return fmt.Errorf("-json: no folder %s", folder)
		}
	}
	if err := loadLibrary(f.library); err != nil {
		return err
	}
	engine, err := newEngine(f.Budget)
	if err != nil {
		return err
	}
	defer engine.Close()
	result := report{Settings: f.settings}

	// Each way gets an empty context of its own.
	for _, w := range ways(engine, f.settings) {
		err := withRun(ctx, f, w, showProgress(progress, w.name, f.Turns), func(r *runner, measured row) (err error) {
			result.Rows = append(result.Rows, measured)
			switch way := r.way.(type) {
			case *cached:
				if mover, ours := way.mover.(kvferryMover); ours {
					result.Check, err = check(ctx, r.model, mover, way.states, r.conversations)
				}
			case *inBlocks:
				result.NotInBlocks = way.reason
				result.BlocksCheck, err = checkBlocks(ctx, way, r.conversations)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if f.json != "-" {
		result.print(out)
	}
	if f.json != "" {
		if err := result.writeJSON(f.json); err != nil {
			return err
		}
	}
	for _, c := range []checked{result.Check, result.BlocksCheck} {
		if c.Identical != c.States {
			return fmt.Errorf("%d states are not what llama.cpp makes of them", c.States-c.Identical)
		}
	}
	return nil
}

// newEngine makes an engine whose PinnedLimit is the budget. So the budget includes the free buffers that the pool keeps.
func newEngine(budget int64) (*kvferry.Engine, error) {
	return kvferry.NewEngine(kvferry.EngineOptions{PinnedLimit: budget})
}

// namedWay is a way that has not been opened yet.
type namedWay struct {
	name string
	open func(*model) (way, error)
}

func ways(engine *kvferry.Engine, s settings) []namedWay {
	return []namedWay{
		{"prefill again", func(m *model) (way, error) { return prefillAgain{m}, nil }},
		{"keep sequences in place", func(m *model) (way, error) { return newKeepInPlace(m), nil }},
		{"llama.cpp", func(m *model) (way, error) { return newCached(engine, m, llamaMover{m}, s.Budget), nil }},
		{"kvferry", func(m *model) (way, error) {
			mover, err := newKvferryMover(engine, m)
			return newCached(engine, m, mover, s.Budget), err
		}},
		{"kvferry, blocks", func(m *model) (way, error) {
			mover, err := newKvferryMover(engine, m)
			return newInBlocks(engine, m, mover, s), err
		}},
	}
}

// withRun holds the conversations in one way, and passes the figures to `use` before it frees everything.
func withRun(ctx context.Context, f flags, w namedWay, progress func(int), use func(*runner, row) error) error {
	m, err := openModel(f.model, f.Sequences, 256, f.threads) // to learn its vocabulary
	if err != nil {
		return err
	}
	turns := schedule(f.settings, m.vocabulary)
	m.close()
	if m, err = openModel(f.model, f.Sequences, longest(f.settings, turns), f.threads); err != nil {
		return err
	}
	defer m.close()
	opened, err := w.open(m)
	if err != nil {
		return err
	}
	defer opened.close()
	r := &runner{settings: f.settings, model: m, way: opened, decoder: newDecoder(m), progress: progress}
	defer r.decoder.close()
	start := time.Now()
	if err := r.run(ctx, turns); err != nil {
		return err
	}
	return use(r, makeRow(w.name, f.settings, time.Since(start), r.figures, opened.figures(), r.decoder.steps))
}

// showProgress returns a function that counts turns on a terminal. Elsewhere it only prints what has begun.
func showProgress(out io.Writer, name string, turns int) func(int) {
	file, isFile := out.(*os.File)
	if isFile {
		if info, err := file.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			return func(done int) {
				fmt.Fprintf(out, "\r%s: turn %d of %d\x1b[K", name, done, turns)
				if done == turns {
					fmt.Fprint(out, "\r\x1b[K")
				}
			}
		}
	}
	fmt.Fprintf(out, "%s: %d turns\n", name, turns)
	return func(int) {}
}
