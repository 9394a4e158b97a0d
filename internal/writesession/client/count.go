package client

import "sync"

// counter adds up what several goroutines have done.
type counter struct {
	mutex    sync.Mutex
	result   PushResult
	progress func(done, total int64)
	done     int64
	total    int64
}

// sent counts bytes of request bodies.
func (c *counter) sent(bytes int64) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.result.BytesWire += bytes
}

// put counts an attempt to upload.
func (c *counter) put(bytes int64) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.result.BytesWire += bytes
	c.result.Requests++
}

// change calls edit where nobody else does.
func (c *counter) change(edit func(*PushResult)) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	edit(&c.result)
}

// expect sets what there is to do from now on, of which nothing is done yet.
func (c *counter) expect(total int64) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.total = c.done + total
	c.report()
}

// advance moves the progress on.
func (c *counter) advance(bytes int64) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.done += bytes
	c.report()
}

// report calls with the lock held, so that no two calls meet.
func (c *counter) report() {
	if c.progress != nil {
		c.progress(c.done, max(c.done, c.total))
	}
}
