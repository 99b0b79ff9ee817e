package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"
)

// report is the program's result. Times are milliseconds.
type report struct {
	Settings settings `json:"settings"`
	Rows     []row    `json:"ways"`
	Check    checked  `json:"check"`
	// BlocksCheck is the same of the conversations in the cache of blocks.
	BlocksCheck checked `json:"blocks_check"`
	// NotInBlocks says why the cache of llama.cpp needs more than blocks, or allows none. It is "" where blocks are enough.
	NotInBlocks string `json:"not_in_blocks"`
}

type row struct {
	Way           string  `json:"way"`
	Seconds       float64 `json:"seconds"`
	FirstP50      float64 `json:"first_token_p50_ms"`
	FirstP95      float64 `json:"first_token_p95_ms"`
	FoundP50      float64 `json:"first_token_after_hit_p50_ms"`
	Prefilled     int     `json:"prefilled_tokens"`
	Hits          int     `json:"hits"`
	Misses        int     `json:"misses"`
	HitRate       float64 `json:"hit_rate"`
	Evictions     int     `json:"evictions"`
	Refusals      int     `json:"refusals"` // states that are larger than the budget
	LoadP50       float64 `json:"load_p50_ms"`
	SaveP50       float64 `json:"save_p50_ms"`
	HeldP50       float64 `json:"context_held_p50_ms"`
	StepP50       float64 `json:"decode_step_p50_ms"`
	StepP99       float64 `json:"decode_step_p99_ms"`
	SavedBytes    int64   `json:"saved_bytes"`
	LoadedBytes   int64   `json:"loaded_bytes"`
	MovedPerTurn  int64   `json:"moved_bytes_per_turn"`
	KeptBytes     int64   `json:"kept_bytes"` // in the cache in the end
	GeneratedPerS float64 `json:"generated_tokens_per_second"`
}

func makeRow(name string, s settings, took time.Duration, f figures, w wayFigures, steps []time.Duration) row {
	r := row{Way: name, Seconds: took.Seconds(), FirstP50: quantile(f.firsts, 0.5), FirstP95: quantile(f.firsts, 0.95),
		FoundP50: quantile(f.found, 0.5), Prefilled: f.prefilled, Hits: w.Hits, Misses: w.Misses, Evictions: w.Evictions,
		Refusals: w.Refusals, LoadP50: quantile(w.loads, 0.5), SaveP50: quantile(w.saves, 0.5), HeldP50: quantile(w.held, 0.5),
		StepP50: quantile(steps, 0.5), StepP99: quantile(steps, 0.99), SavedBytes: w.savedBytes, LoadedBytes: w.loadedBytes,
		MovedPerTurn: (w.savedBytes + w.loadedBytes) / int64(s.Turns), KeptBytes: w.keptBytes,
		GeneratedPerS: float64(s.Turns*s.Generate) / took.Seconds()}
	if all := w.Hits + w.Misses; all > 0 {
		r.HitRate = float64(w.Hits) / float64(all)
	}
	return r
}

// quantile returns a quantile of values in milliseconds, or 0 where there are none.
func quantile(values []time.Duration, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return float64(sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]) / 1e6
}

func (r report) print(out io.Writer) {
	s := r.Settings
	fmt.Fprintf(out, "%d turns of %d conversations on %d sequences, %d tokens generated each; %d tokens of system prompt; budget %s\n\n",
		s.Turns, s.Conversations, s.Sequences, s.Generate, s.System, mebibytes(s.Budget))
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\tfirst token\tp95\tafter a hit\tprefilled\thit rate\tevicted\tload\tsave\tof it held\tdecode step\tp99\tsaved\tloaded\tmoved a turn\tkept\tall\t")
	for _, w := range r.Rows {
		hitRate, evicted := "-", "-"
		if w.Hits+w.Misses > 0 {
			hitRate, evicted = fmt.Sprintf("%.0f %%", 100*w.HitRate), fmt.Sprint(w.Evictions)
		}
		fmt.Fprintf(table, "%s\t%.1f ms\t%.1f ms\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%.2f ms\t%.2f ms\t%s\t%s\t%s\t%s\t%.2f s\t\n",
			w.Way, w.FirstP50, w.FirstP95, milliseconds(w.FoundP50, 1), w.Prefilled, hitRate, evicted, milliseconds(w.LoadP50, 2),
			milliseconds(w.SaveP50, 2), milliseconds(w.HeldP50, 2), w.StepP50, w.StepP99, mebibytes(w.SavedBytes),
			mebibytes(w.LoadedBytes), mebibytes(w.MovedPerTurn), mebibytes(w.KeptBytes), w.Seconds)
	}
	table.Flush()
	fmt.Fprintln(out, "\nTimes are medians. Load and save begin when the context is free; held is how long nothing can be decoded.\n"+
		"All ways hold the same turns in the same sequences and in the same order, so hits and evictions are the same in\n"+
		"every run. A first token waits for the prompts of other turns too. Blocks hold tokens that conversations share, so a\n"+
		"hit may be the system prompt alone, and what is evicted is a block. Kept is what is in the cache in the end.")
	if r.NotInBlocks != "" {
		fmt.Fprintf(out, "\nMore than blocks is needed: %s\n", r.NotInBlocks)
	}
	if r.Check.States == 0 {
		fmt.Fprintln(out, "\nNo state was in the cache in the end, so none was compared.")
	} else {
		r.Check.print(out, "states")
	}
	if r.BlocksCheck.States > 0 {
		r.BlocksCheck.print(out, "conversations in blocks")
	}
}

func (c checked) print(out io.Writer, what string) {
	fmt.Fprintf(out, "\n%d of %d %s: loaded by kvferry as by llama.cpp's own call, the same bytes and the same next logits\n",
		c.Identical, c.States, what)
	fmt.Fprintf(out, "%d of %d %s: the same next token as after prefilling again (logits differ by at most %.2g of the largest)\n",
		c.SameToken, c.States, what, c.LargestDiff)
}

// milliseconds formats a time, or a dash where nothing was measured.
func milliseconds(value float64, digits int) string {
	if value == 0 {
		return "-"
	}
	return fmt.Sprintf("%.*f ms", digits, value)
}

// mebibytes formats a number of bytes, or a dash for 0.
func mebibytes(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

// writeJSON writes all figures. The file is not there before it is complete.
func (r report) writeJSON(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if path == "-" {
		_, err := fmt.Printf("%s\n", text)
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name()) // fails once the file has been renamed
	_, err = file.Write(append(text, '\n'))
	if err == nil {
		err = file.Chmod(0o644)
	}
	if other := file.Close(); err == nil {
		err = other
	}
	if err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}
