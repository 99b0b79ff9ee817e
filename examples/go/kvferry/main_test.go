package kvferry_test

import (
	"cmp"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"testing"

	"example.org/kvferry/internal/llamatest"
)

var (
	llamaLibrary = cmp.Or(os.Getenv("KVFERRY_LLAMA_LIB"), "../../../build/llama")
	llamaModel   = "../../../build/models/kvcache.gguf"
)

// An example cannot skip itself, so those that need a libllama are left out here where there is none. A libllama that
// KVFERRY_LLAMA_LIB names has to be there.
func TestMain(m *testing.M) {
	flag.Parse()
	for _, needed := range []string{filepath.Join(llamaLibrary, "libllama.so"), llamaModel} {
		if _, err := os.Stat(needed); err != nil {
			if os.Getenv("KVFERRY_LLAMA_LIB") != "" {
				log.Fatal("KVFERRY_LLAMA_LIB is set, but: ", err)
			}
			fmt.Fprintln(os.Stderr, "SKIPPED: the examples that need llama.cpp (run `make go-kvcache` in the root of kvferry):", err)
			leaveOut("^(Example|ExampleEngine_Attach|ExampleSequence_.*|ExampleCutState)$")
			break
		}
	}
	os.Exit(m.Run())
}

// leaveOut adds to what -skip leaves out.
func leaveOut(pattern string) {
	skip := flag.Lookup("test.skip")
	if given := skip.Value.String(); given != "" {
		pattern = given + "|" + pattern
	}
	if err := skip.Value.Set(pattern); err != nil {
		log.Fatal(err)
	}
}

// openContext opens a llama_context as a program's own bindings do.
func openContext() *llamatest.Context { return openModel(llamaModel) }

func openModel(model string) *llamatest.Context {
	folder, err := filepath.Abs(llamaLibrary)
	if err != nil {
		log.Fatal(err)
	}
	context, err := llamatest.Open(folder, model, 3)
	if err != nil {
		log.Fatal(err)
	}
	return context
}
