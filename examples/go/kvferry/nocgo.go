//go:build !cgo

package kvferry

// Go leaves the other files out where it does not use cgo: with CGO_ENABLED=0, as when cross-compiling, or where there is
// no C compiler. What the name below says is then the compiler's error, instead of a list of what those files define.
var _ = kvferry_needs_cgo__set_CGO_ENABLED_1_and_install_a_C_compiler
