package kvferry

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"strconv"
	"strings"
)

// The file of a block or a checkpoint, as the Python package writes it, too: a line with the kind and the version of its
// format; a line with the length of the header in bytes and the header's XXH64; the header, in JSON; the bytes. Where the
// header has an entry "llm", tokens and scores of Python's llama_cpp.Llama follow. Go verifies these and leaves them.

const (
	partVersion    = 1
	mostHeader     = 1 << 16
	mostAllocation = 1 << 26 // before so many bytes have really been read
)

type partHeader struct {
	Fingerprint *string            `json:"fingerprint"`
	Positions   map[string]*int32  `json:"positions"`
	Keys        map[string]*string `json:"keys"` // in hex
	Checksum    *uint64            `json:"xxh64"`
	Bytes       *uint64            `json:"bytes"`
	Llm         *struct {
		Tokens   *uint32 `json:"tokens"`
		Columns  *uint32 `json:"columns"`
		Checksum *uint32 `json:"crc32"`
	} `json:"llm,omitempty"`
}

func damaged(detail string) error { return &Error{Status: ErrStateDamaged, Detail: detail} }

// orNone returns nil for "", which stands for what the program has not given.
func orNone(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}

func (h *partHeader) setKey(name, key string) {
	if h.Keys == nil {
		h.Keys = map[string]*string{}
	}
	h.Keys[name] = orNone(hex.EncodeToString([]byte(key)))
}

func (h *partHeader) setPosition(name string, position int) error {
	if !isPosition(position) {
		return &Error{Status: ErrInvalidArgument, Detail: "no such position"}
	}
	if h.Positions == nil {
		h.Positions = map[string]*int32{}
	}
	p := int32(position)
	h.Positions[name] = &p
	return nil
}

func (h *partHeader) key(name string) (string, error) {
	text, there := h.Keys[name]
	if !there {
		return "", damaged("the header has no " + name)
	}
	if text == nil {
		return "", nil
	}
	key, err := hex.DecodeString(*text)
	if err != nil {
		return "", damaged("the " + name + " in the header")
	}
	return string(key), nil
}

func (h *partHeader) position(name string) (int, error) {
	p := h.Positions[name]
	if p == nil || *p < 0 {
		return 0, damaged("the header has no " + name)
	}
	return int(*p), nil
}

func (h *partHeader) fingerprint() string {
	if h.Fingerprint == nil {
		return ""
	}
	return *h.Fingerprint
}

// bytesOfLlm returns how many bytes follow the part's own.
func (h *partHeader) bytesOfLlm() (int64, error) {
	if h.Llm == nil {
		return 0, nil
	}
	if h.Llm.Tokens == nil || h.Llm.Checksum == nil {
		return 0, damaged("the header's llm")
	}
	columns := uint64(0)
	if h.Llm.Columns != nil {
		columns = uint64(*h.Llm.Columns)
	}
	words := uint64(*h.Llm.Tokens) * (1 + columns)
	if words > math.MaxInt64/4 {
		return 0, damaged("the header's llm")
	}
	return int64(4 * words), nil
}

// writePart writes a whole file. It fills in what the header says of the data.
func writePart(w io.Writer, kind string, header partHeader, data []byte) (int64, error) {
	checksum, size := xxh64(data), uint64(len(data))
	header.Checksum, header.Bytes = &checksum, &size
	text, err := json.Marshal(header)
	if err != nil {
		return 0, err
	}
	text = append(text, '\n')
	first := fmt.Appendf(nil, "kvferry %s %d\n%d %016x\n", kind, partVersion, len(text), xxh64(text))
	var written int64
	for _, piece := range [][]byte{first, text, data} {
		n, err := w.Write(piece)
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// countingReader counts what is read.
type countingReader struct {
	reader io.Reader
	count  int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.reader.Read(p)
	c.count += int64(n)
	return n, err
}

// readPart reads a whole file, and verifies every byte. The data goes to the beginning of `into`, or to new memory if
// `into` is nil. The header is returned also with ErrBufferTooSmall.
func readPart(r io.Reader, kind string, into []byte) (header partHeader, data []byte, count int64, err error) {
	counting := &countingReader{reader: r}
	header, data, err = readPartFrom(bufio.NewReader(counting), kind, into)
	return header, data, counting.count, err
}

func readPartFrom(r *bufio.Reader, kind string, into []byte) (partHeader, []byte, error) {
	header, err := readPartHeader(r, kind)
	if err != nil {
		return partHeader{}, nil, err
	}
	rest, err := header.bytesOfLlm()
	if err != nil {
		return partHeader{}, nil, err
	}
	if into != nil && *header.Bytes > uint64(len(into)) {
		detail := fmt.Sprintf("the file has %d bytes, the memory %d", *header.Bytes, len(into))
		return header, nil, &Error{Status: ErrBufferTooSmall, Detail: detail}
	}
	data, err := readData(r, into, *header.Bytes)
	if err != nil {
		return partHeader{}, nil, err
	}
	if xxh64(data) != *header.Checksum {
		return partHeader{}, nil, damaged("the checksum is wrong")
	}
	crc := crc32.NewIEEE()
	if n, err := io.CopyN(crc, r, rest); err != nil {
		return partHeader{}, nil, truncated(err)
	} else if n > 0 && crc.Sum32() != *header.Llm.Checksum {
		return partHeader{}, nil, damaged("the checksum of its tokens is wrong")
	}
	if _, err := r.ReadByte(); err == nil {
		return partHeader{}, nil, damaged("the file has more bytes than it says")
	} else if err != io.EOF {
		return partHeader{}, nil, err
	}
	return header, data, nil
}

func readPartHeader(r *bufio.Reader, kind string) (header partHeader, err error) {
	first, err := r.ReadSlice('\n')
	if err != nil && err != bufio.ErrBufferFull {
		return header, truncated(err)
	}
	if name := "kvferry " + kind + " "; string(first) != name+strconv.Itoa(partVersion)+"\n" {
		if strings.HasPrefix(string(first), name) {
			return header, damaged("no " + kind + " that this version knows")
		}
		return header, damaged("no " + kind)
	}
	second, err := r.ReadSlice('\n')
	if err != nil && err != bufio.ErrBufferFull {
		return header, truncated(err)
	}
	line := string(second)
	length, _, _ := strings.Cut(line, " ")
	size, err := strconv.Atoi(length)
	if err != nil || size <= 0 || size > mostHeader {
		return header, damaged("the header")
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(r, text); err != nil {
		return header, truncated(err)
	}
	if line != fmt.Sprintf("%d %016x\n", size, xxh64(text)) {
		return header, damaged("the header")
	}
	if err := json.Unmarshal(text, &header); err != nil || header.Checksum == nil || header.Bytes == nil ||
		*header.Bytes > math.MaxInt64 {
		return partHeader{}, damaged("the header")
	}
	return header, nil
}

// readData reads so many bytes into the beginning of `into`. Without it, memory is allocated as bytes really come.
func readData(r io.Reader, into []byte, size uint64) ([]byte, error) {
	if into != nil {
		data := into[:size]
		if _, err := io.ReadFull(r, data); err != nil {
			return nil, truncated(err)
		}
		return data, nil
	}
	data := make([]byte, 0, min(size, mostAllocation))
	for uint64(len(data)) < size {
		if len(data) == cap(data) {
			grown := make([]byte, len(data), min(size, 2*uint64(cap(data))))
			copy(grown, data)
			data = grown
		}
		next := data[len(data):cap(data)]
		if _, err := io.ReadFull(r, next); err != nil {
			return nil, truncated(err)
		}
		data = data[:cap(data)]
	}
	return data, nil
}

// truncated returns the error of a file that ends too early; other errors are the reader's own.
func truncated(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("the file is truncated")
	}
	return err
}
