package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"example.org/kvferry"
	"example.org/kvferry/internal/baseline"
)

func TestRegisteredMemoryIsRefusedTwiceAndReleased(t *testing.T) {
	engine := newEngine(t)
	memory := make([]byte, 1<<20)
	registration, err := engine.Register(memory)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Register(memory[1:]); !errors.Is(err, kvferry.ErrBusy) {
		t.Errorf("registering twice gave %v", err)
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(pattern(1<<20, 3)), kvferry.Bytes(memory)); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := registration.Close(); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(memory, pattern(1<<20, 3)) {
		t.Error("damaged")
	}
}

func TestForgottenRegistrationSaysWhereItWasMade(t *testing.T) {
	const child = "KVFERRY_TEST_FORGETS"
	if os.Getenv(child) != "" { // what follows ends the process
		registerAndForget(t)
		for range 100 {
			runtime.GC()
			time.Sleep(10 * time.Millisecond)
		}
		return
	}
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	command.Env = append(os.Environ(), child+"=1")
	said, err := command.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("the process ended with %v:\n%s", err, said)
	}
	for _, word := range []string{"panic: kvferry: ", "Registration", "Close", "registerAndForget", "registration_test.go:", "(*Registration)"} {
		if !strings.Contains(string(said), word) {
			t.Errorf("it does not say %q:\n%s", word, said)
		}
	}
}

// A copy that does not end may still write to the memory, so the memory stays pinned for ever. The program has done what it
// can when it has closed the Registration.
func TestRegistrationOfALostDeviceMayBeDropped(t *testing.T) {
	const child = "KVFERRY_TEST_LOSES"
	driver := os.Getenv("KVFERRY_SIMULATED_CUDA")
	if driver == "" {
		t.Skip("no simulated CUDA driver: KVFERRY_SIMULATED_CUDA names it")
	}
	if os.Getenv(child) == "" {
		command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		command.Env = append(os.Environ(), child+"=1", "KVFERRY_STUCK_SECONDS=1", "KVFSIM_HOLD=copy:1+")
		if said, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%v:\n%s", err, said)
		}
		return
	}
	const size = 4 << 20
	engine := newCUDAEngine(t)
	device := baseline.DeviceAlloc(driver, size)
	if device == 0 {
		t.Fatal("no device memory")
	}
	var address uintptr
	func() {
		memory := make([]byte, size)
		address = uintptr(unsafe.Pointer(&memory[0]))
		registration, err := engine.Register(memory)
		if err != nil {
			t.Fatal(err)
		}
		region := kvferry.Region{Address: kvferry.At(device), Width: size, Rows: 1}
		_, err = engine.SaveRegions(context.Background(), []kvferry.Region{region}, kvferry.Bytes(memory))
		if !errors.Is(err, kvferry.ErrDeviceLost) {
			t.Fatalf("the save gave %v", err)
		}
		for range 2 {
			if err := registration.Close(); !errors.Is(err, kvferry.ErrDeviceLost) {
				t.Errorf("closing gave %v", err)
			}
		}
	}()
	for range 50 {
		runtime.GC()
		time.Sleep(time.Millisecond)
		if again := make([]byte, size); uintptr(unsafe.Pointer(&again[0])) == address {
			t.Fatal("the memory was given to somebody else")
		}
	}
}

//go:noinline
func registerAndForget(t *testing.T) {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Register(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
}

func TestClosedRegistrationMayBeDropped(t *testing.T) {
	engine := newEngine(t)
	func() {
		registration, err := engine.Register(make([]byte, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		if err := registration.Close(); err != nil {
			t.Fatal(err)
		}
	}()
	for range 5 {
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
}

func TestRegistrationMayBeClosedAfterItsEngine(t *testing.T) {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		t.Fatal(err)
	}
	memory := make([]byte, 1<<20)
	registration, err := engine.Register(memory)
	if err != nil {
		t.Fatal(err)
	}
	if err := engine.Close(); err != nil {
		t.Fatal(err)
	}
	if err := registration.Close(); err != nil {
		t.Error(err)
	}
	again, err := newEngine(t).Register(memory)
	if err != nil {
		t.Fatalf("registering the memory again gave %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}
