package kvferry_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestWithoutCgoTheCompilerSaysWhatIsNeeded(t *testing.T) {
	command := exec.Command("go", "build", ".")
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	said, err := command.CombinedOutput()
	if err == nil {
		t.Fatal("it was built")
	}
	for _, word := range []string{"kvferry_needs_cgo", "CGO_ENABLED_1", "C_compiler"} {
		if !strings.Contains(string(said), word) {
			t.Errorf("it does not say %q:\n%s", word, said)
		}
	}
}

// A code block of the documentation is the body of this function, between the lock and the return.
const documentedFunction = `package main

import (
	"context"
	"sync"

	"example.org/kvferry"
)

func documented(ctx context.Context, llamaContext uintptr) error {
	var lock sync.Mutex
%s
	return err
}

func main() { documented(context.Background(), 0) }
`

func TestCodeInTheDocumentationCompiles(t *testing.T) {
	for file, block := range map[string]*regexp.Regexp{
		"doc.go":       regexp.MustCompile(`(?m)(?:^//\t.*\n|^//\n)*^//\t.*\n`),
		"../README.md": regexp.MustCompile("(?s)```go\n(.*?)```"),
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			if file != "doc.go" {
				t.Log("not in the source tree: ", err)
				continue
			}
			t.Fatal(err)
		}
		blocks := block.FindAllString(string(text), -1)
		if len(blocks) == 0 {
			t.Errorf("%s has no code", file)
		}
		for _, code := range blocks {
			code = regexp.MustCompile("(?m)^(//|```.*$)").ReplaceAllString(code, "")
			program := filepath.Join(t.TempDir(), "main.go")
			if err := os.WriteFile(program, fmt.Appendf(nil, documentedFunction, code), 0o644); err != nil {
				t.Fatal(err)
			}
			if said, err := exec.Command("go", "vet", program).CombinedOutput(); err != nil {
				t.Errorf("%s:\n%s%s", file, code, said)
			}
		}
	}
}
