//go:build !cgo

package kvferry

// Go ignores the other files where it does not use cgo: with CGO_ENABLED=0, which is so when cross-compiling, or where
// there is no C compiler. The compiler's error is then the name below, instead of a list of everything undefined.
var _ = kvferry_needs_cgo__set_CGO_ENABLED_1_and_install_a_C_compiler
