package kvferry_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"example.org/kvferry"
)

// Each status of the header has an error in Go with the same number, name and text.
func TestEveryStatusOfTheHeaderIsAnErrorInGo(t *testing.T) {
	header, err := os.Open("../../../include/kvferry.h")
	if err != nil {
		t.Skip("not in the source tree: ", err)
	}
	defer header.Close()
	source, err := os.ReadFile("status.go")
	if err != nil {
		t.Fatal(err)
	}
	entry := regexp.MustCompile(`^\s+KVF_(ERR_\w+) = (-\d+), +/\* (.*) \*/$`)
	found := 0
	for lines := bufio.NewScanner(header); lines.Scan(); {
		match := entry.FindStringSubmatch(lines.Text())
		if match == nil {
			continue
		}
		found++
		var number int32
		fmt.Sscan(match[2], &number)
		status := kvferry.Status(number)
		if status.Name() != "KVF_"+match[1] || status.Error() != match[3] {
			t.Errorf("%d is %s, %q", number, status.Name(), status.Error())
		}
		if !strings.Contains(string(source), " = C.KVF_"+match[1]+"\n") {
			t.Errorf("%s has no constant in status.go", match[1])
		}
	}
	if found < 28 {
		t.Errorf("%d statuses in the header", found)
	}
}

func TestAnErrorIsItsStatusAndItsCause(t *testing.T) {
	cause := errors.New("why")
	var err error = fmt.Errorf("saving: %w", &kvferry.Error{Status: kvferry.ErrBusy, Detail: "by a load", Cause: cause})
	if !errors.Is(err, kvferry.ErrBusy) || !errors.Is(err, cause) || errors.Is(err, kvferry.ErrClosed) {
		t.Error("errors.Is")
	}
	if want := "saving: in use by a job in flight or by another object: by a load: why"; err.Error() != want {
		t.Errorf("%q", err.Error())
	}
}

func TestARefusalSaysMoreThanItsStatus(t *testing.T) {
	engine := newEngine(t)
	_, err := engine.SaveRegions(context.Background(), regionsOf(make([]byte, 10)), kvferry.Bytes(make([]byte, 5)))
	if !errors.Is(err, kvferry.ErrBufferTooSmall) ||
		err.Error() != "the buffer is too small: 10 bytes are needed, 5 were given" {
		t.Errorf("%v", err)
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(make([]byte, 10)), nil); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Errorf("%v", err)
	}
	if _, err := engine.NewBuffer(0); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Errorf("%v", err)
	}
	limited, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly, PinnedLimit: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer limited.Close()
	if _, err := limited.NewBuffer(2 << 20); !errors.Is(err, kvferry.ErrPinnedLimit) ||
		err.Error() != "the engine's limit of pinned memory is reached: 0 bytes of 1 MiB taken, 2 MiB wanted" {
		t.Errorf("%v", err)
	}
	if _, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: 77}); !errors.Is(err, kvferry.ErrInvalidArgument) ||
		err.Error() != "invalid argument: no such devices" {
		t.Errorf("%v", err)
	}
}
