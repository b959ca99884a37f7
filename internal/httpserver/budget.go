package httpserver

import "sync/atomic"

// MemoryBudget bounds the bytes that requests hold of one kind. A request that holds
// little of it may always hold that, so that large ones do not keep small ones out. Any
// number of goroutines may use it.
type MemoryBudget struct {
	max   int64 // of all requests together
	small int   // of one request, whatever the others hold
	used  atomic.Int64
}

// Reserve counts n more bytes of a request that then holds held of them. It reports whether
// the request may hold so many. Either way they count until they are released.
func (b *MemoryBudget) Reserve(n, held int) bool {
	return b.used.Add(int64(n)) <= b.max || held <= b.small
}

// Release says that a request holds n bytes less.
func (b *MemoryBudget) Release(n int) { b.used.Add(-int64(n)) }

// Exceeded reports whether requests hold more than the budget.
func (b *MemoryBudget) Exceeded() bool { return b.used.Load() > b.max }

// Used returns how many bytes requests hold.
func (b *MemoryBudget) Used() int64 { return b.used.Load() }
