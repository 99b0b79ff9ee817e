package kvferry_test

import (
	"os"
	"os/exec"
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
