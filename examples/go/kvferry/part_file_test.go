package kvferry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"example.org/kvferry"
)

// testdata has files of this package and of the one for Python: tests/python/test_go_files.py is the other half of these
// tests. Each package writes its files as they are there, and reads those of the other.

const partKey, partParent = "\x00two\xff", "one"

func partData() []byte {
	data := make([]byte, 100)
	for i := range data {
		data[i] = byte(i)
	}
	return data
}

func partBlock() kvferry.Block {
	return kvferry.Block{Memory: kvferry.Bytes(partData()), Begin: 256, End: 512, Key: partKey, Parent: partParent,
		Fingerprint: "a model"}
}

func partCheckpoint() kvferry.Checkpoint {
	return kvferry.Checkpoint{Memory: kvferry.Bytes(partData()), Position: 511, Key: partKey, Fingerprint: "a model"}
}

// part is a *Block or a *Checkpoint.
type part interface {
	io.WriterTo
	io.ReaderFrom
	WriteFile(path string) error
	ReadFile(path string) error
	Checksum() (uint64, error)
}

func fileOf(tb testing.TB, p part) []byte {
	tb.Helper()
	var file bytes.Buffer
	n, err := p.WriteTo(&file)
	if err != nil || n != int64(file.Len()) {
		tb.Fatalf("%d bytes of %d, %v", n, file.Len(), err)
	}
	return file.Bytes()
}

func TestFilesAreWrittenAsPythonReadsThem(t *testing.T) {
	block, checkpoint := partBlock(), partCheckpoint()
	bare := kvferry.Block{Memory: kvferry.Bytes(partData()), Size: 9, End: 1}
	for name, p := range map[string]part{"go.block": &block, "go.checkpoint": &checkpoint, "go-bare.block": &bare} {
		expected, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		if file := fileOf(t, p); !bytes.Equal(file, expected) {
			t.Errorf("%s is %q", name, file)
		}
	}
}

func TestFilesThatPythonHasWrittenAreRead(t *testing.T) {
	var block kvferry.Block
	if err := block.ReadFile("testdata/python.block"); err != nil {
		t.Fatal(err)
	}
	expectBlock(t, block, partBlock())

	bare := kvferry.Block{Key: "old", Parent: "old", Fingerprint: "old"}
	if err := bare.ReadFile("testdata/python-llm.block"); err != nil {
		t.Fatal(err)
	}
	expectBlock(t, bare, kvferry.Block{Memory: kvferry.Bytes(partData()), End: 3})

	var checkpoint kvferry.Checkpoint
	if err := checkpoint.ReadFile("testdata/python.checkpoint"); err != nil {
		t.Fatal(err)
	}
	expected := partCheckpoint()
	if !bytes.Equal(checkpoint.Memory.(kvferry.Bytes), partData()) || checkpoint.Size != 100 ||
		checkpoint.Position != 511 || checkpoint.Key != expected.Key || checkpoint.Fingerprint != expected.Fingerprint {
		t.Errorf("%+v", checkpoint)
	}
}

func expectBlock(t *testing.T, got, expected kvferry.Block) {
	t.Helper()
	if !bytes.Equal(got.Memory.(kvferry.Bytes), expected.Memory.(kvferry.Bytes)) || got.Size != 100 {
		t.Errorf("%d bytes: %v", got.Size, got.Memory)
	}
	got.Memory, expected.Memory, got.Size = nil, nil, 0
	if got != expected {
		t.Errorf("%+v, not %+v", got, expected)
	}
}

// From XXH64's reference implementation.
func TestTheChecksumIsXXH64(t *testing.T) {
	for text, expected := range map[string]uint64{
		"":    0xEF46DB3751D8E999,
		"a":   0xD24EC4F1A98C6E5B,
		"abc": 0x44BC2CF5AD770999,
		"Call me Ishmael. Some years ago--never mind how long precisely-": 0x02A2E85470D6FD96,
	} {
		block := kvferry.Block{Memory: kvferry.Bytes(text)}
		if sum, err := block.Checksum(); err != nil || sum != expected {
			t.Errorf("%q: %#x, %v", text, sum, err)
		}
	}
}

func TestEveryDamagedByteOfAFileIsFound(t *testing.T) {
	for _, name := range []string{"python.block", "python-llm.block", "go.checkpoint"} {
		file, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		refused := func(what string, damaged []byte) {
			t.Helper()
			block := kvferry.Block{Begin: 7}
			checkpoint := kvferry.Checkpoint{Position: 7}
			p := part(&block)
			if strings.HasSuffix(name, "checkpoint") {
				p = &checkpoint
			}
			if _, err := p.ReadFrom(bytes.NewReader(damaged)); !errors.Is(err, kvferry.ErrStateDamaged) {
				t.Fatalf("%s, %s: %v", name, what, err)
			}
			if (block != kvferry.Block{Begin: 7} || checkpoint != kvferry.Checkpoint{Position: 7}) {
				t.Fatalf("%s, %s: it has changed", name, what)
			}
		}
		for i := range file {
			for _, bit := range []byte{1, 0x20} {
				damaged := bytes.Clone(file)
				damaged[i] ^= bit
				refused("changed", damaged)
			}
			refused("cut off", file[:i])
		}
		refused("with more bytes", append(bytes.Clone(file), 0))
	}
}

func TestAFileOfAnotherKindIsRefused(t *testing.T) {
	block, checkpoint := partBlock(), partCheckpoint()
	for _, file := range [][]byte{fileOf(t, &checkpoint), []byte("kvferry block 2\n1 0\n\n"), []byte("kvferry state 1\n"),
		nil, bytes.Repeat([]byte("x"), 1<<20)} {
		if _, err := block.ReadFrom(bytes.NewReader(file)); !errors.Is(err, kvferry.ErrStateDamaged) {
			t.Errorf("%.20q: %v", file, err)
		}
	}
	expectBlock(t, kvferry.Block{Memory: block.Memory, Size: 100, Begin: block.Begin, End: block.End, Key: block.Key,
		Parent: block.Parent, Fingerprint: block.Fingerprint}, partBlock())
}

// A header has a checksum, and anybody can write one. No memory is allocated for bytes that do not come.
func TestAFileThatPromisesTooMuchIsTruncated(t *testing.T) {
	block := kvferry.Block{Memory: kvferry.Bytes(nil), End: 1}
	file := string(fileOf(t, &block))
	header := file[strings.Index(file, "{"):]
	promising := kvferry.Block{Memory: kvferry.Bytes(strings.Replace(header, `"bytes":0`, `"bytes":9000000000000000`, 1))}
	sum, err := promising.Checksum()
	if err != nil {
		t.Fatal(err)
	}
	text := string(promising.Memory.(kvferry.Bytes))
	made := "kvferry block 1\n" + headerLine(len(text), sum) + text
	if _, err := new(kvferry.Block).ReadFrom(strings.NewReader(made)); !errors.Is(err, kvferry.ErrStateDamaged) ||
		!strings.Contains(err.Error(), "truncated") {
		t.Error(err)
	}
}

func TestAPartIsReadIntoMemoryOfTheProgram(t *testing.T) {
	engine := newEngine(t)
	block := partBlock()
	file := fileOf(t, &block)

	into := kvferry.Block{Memory: newBuffer(t, engine, 1000)}
	if n, err := into.ReadFrom(iotest.OneByteReader(bytes.NewReader(file))); err != nil || n != int64(len(file)) {
		t.Fatal(n, err)
	}
	if into.Size != 100 || !bytes.Equal(into.Memory.(*kvferry.Buffer).Bytes()[:100], partData()) {
		t.Errorf("%+v", into)
	}
	if again := fileOf(t, &into); !bytes.Equal(again, file) {
		t.Errorf("%q", again)
	}

	small := kvferry.Block{Memory: kvferry.Bytes(make([]byte, 99)), End: 5}
	if _, err := small.ReadFrom(bytes.NewReader(file)); !errors.Is(err, kvferry.ErrBufferTooSmall) || small.Size != 100 || small.End != 5 {
		t.Errorf("%v, %+v", err, small)
	}
	closed := newBuffer(t, engine, 1000)
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	gone := kvferry.Block{Memory: closed, End: 1}
	if _, err := gone.ReadFrom(bytes.NewReader(file)); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Error(err)
	}
	if _, err := gone.WriteTo(io.Discard); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Error(err)
	}
	if _, err := gone.Checksum(); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Error(err)
	}
	for _, wrong := range []kvferry.Block{{Memory: kvferry.Bytes(nil), Begin: -1, End: 1}, {Memory: kvferry.Bytes(nil), End: 1, Size: 1}, {End: 1}} {
		if _, err := wrong.WriteTo(io.Discard); !errors.Is(err, kvferry.ErrInvalidArgument) {
			t.Errorf("%+v: %v", wrong, err)
		}
	}
}

func TestTheErrorsOfReaderAndWriterAreReturned(t *testing.T) {
	block := partBlock()
	file := fileOf(t, &block)
	failing := errors.New("no more")
	for n := range file {
		reader := io.MultiReader(bytes.NewReader(file[:n]), iotest.ErrReader(failing))
		if _, err := new(kvferry.Block).ReadFrom(reader); !errors.Is(err, failing) {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		if written, err := block.WriteTo(&failingWriter{left: n, err: failing}); !errors.Is(err, failing) || written != int64(n) {
			t.Fatalf("after %d bytes: %d, %v", n, written, err)
		}
	}
}

type failingWriter struct {
	left int
	err  error
}

func (w *failingWriter) Write(p []byte) (int, error) {
	if len(p) <= w.left {
		w.left -= len(p)
		return len(p), nil
	}
	n := w.left
	w.left = 0
	return n, w.err
}

func TestAFileIsReplacedWholeOrNotAtAll(t *testing.T) {
	folder := t.TempDir()
	path, link := filepath.Join(folder, "a.block"), filepath.Join(folder, "link")
	block := partBlock()
	if err := block.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a.block", link); err != nil {
		t.Fatal(err)
	}
	wrong := partBlock()
	wrong.Size = 101
	if err := wrong.WriteFile(path); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Fatal(err)
	}
	next := partBlock()
	next.Key = "next"
	if err := next.WriteFile(link); err != nil {
		t.Fatal(err)
	}
	var read kvferry.Block
	if err := read.ReadFile(path); err != nil || read.Key != "next" {
		t.Error(read.Key, err)
	}
	if mode, err := os.Lstat(link); err != nil || mode.Mode()&os.ModeSymlink == 0 {
		t.Error("the link is gone")
	}
	if mode, err := os.Stat(path); err != nil || mode.Mode().Perm() != 0o640 {
		t.Error("the mode has changed")
	}
	if entries, err := os.ReadDir(folder); err != nil || len(entries) != 2 {
		t.Error(entries, err)
	}
	if err := read.ReadFile(filepath.Join(folder, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func headerLine(size int, checksum uint64) string { return fmt.Sprintf("%d %016x\n", size, checksum) }
