//! Borrowed row-major matrices: what the CPU kernels work on.

/// `rows × cols` values with a row stride of `ld`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub ld: usize,
}

/// The same, writable.
#[derive(Debug)]
pub struct RowsMut<'a> {
    pub data: &'a mut [f32],
    pub rows: usize,
    pub cols: usize,
    pub ld: usize,
}

impl<'a> Rows<'a> {
    /// A dense matrix.
    pub fn dense(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    pub fn new(data: &'a [f32], rows: usize, cols: usize, ld: usize) -> Self {
        assert!(cols <= ld || rows <= 1, "row length {cols} exceeds the leading dimension {ld}");
        assert!(
            rows == 0 || data.len() >= (rows - 1) * ld + cols,
            "{} values hold no [{rows}, {cols}] ld {ld}",
            data.len()
        );
        Self { data, rows, cols, ld }
    }

    pub fn row(&self, r: usize) -> &'a [f32] {
        &self.data[r * self.ld..r * self.ld + self.cols]
    }

    /// Rows `start..end`.
    pub fn slice(&self, start: usize, end: usize) -> Rows<'a> {
        assert!(start <= end && end <= self.rows);
        if start == end {
            return Rows { data: &[], rows: 0, cols: self.cols, ld: self.ld };
        }
        Rows {
            data: &self.data[start * self.ld..(end - 1) * self.ld + self.cols],
            rows: end - start,
            ..*self
        }
    }
}

impl<'a> RowsMut<'a> {
    pub fn dense(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, ld: usize) -> Self {
        assert!(cols <= ld || rows <= 1, "row length {cols} exceeds the leading dimension {ld}");
        assert!(
            rows == 0 || data.len() >= (rows - 1) * ld + cols,
            "{} values hold no [{rows}, {cols}] ld {ld}",
            data.len()
        );
        Self { data, rows, cols, ld }
    }

    pub fn row(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.ld..r * self.ld + self.cols]
    }

    pub fn as_rows(&self) -> Rows<'_> {
        Rows { data: self.data, rows: self.rows, cols: self.cols, ld: self.ld }
    }

    /// Disjoint blocks of at most `block` rows, with the first row's index: work to divide among threads.
    pub fn blocks(self, block: usize) -> Vec<(usize, RowsMut<'a>)> {
        let RowsMut { mut data, rows, cols, ld } = self;
        let mut out = Vec::with_capacity(rows.div_ceil(block.max(1)));
        let mut start = 0;
        while start < rows {
            let n = block.min(rows - start);
            let take = if start + n < rows { n * ld } else { data.len() };
            let (head, tail) = std::mem::take(&mut data).split_at_mut(take);
            out.push((start, RowsMut { data: head, rows: n, cols, ld }));
            data = tail;
            start += n;
        }
        out
    }
}

/// A matrix that many tasks write at once, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    at: *mut f32,
    rows: usize,
    cols: usize,
    pub(crate) ld: usize,
    owner: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: it only gives out a pointer; whoever writes through it promises to touch elements that no other
// task touches.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(m: RowsMut<'a>) -> Self {
        Self {
            at: m.data.as_mut_ptr(),
            rows: m.rows,
            cols: m.cols,
            ld: m.ld,
            owner: std::marker::PhantomData,
        }
    }

    /// Where the matrix begins.
    #[inline(always)]
    pub(crate) fn base(&self) -> *mut f32 {
        self.at
    }

    /// The element's address. Valid for the rest of the matrix; no other task may touch what is written.
    #[inline(always)]
    pub(crate) fn at(&self, r: usize, c: usize) -> *mut f32 {
        debug_assert!(r < self.rows && c < self.cols);
        self.at.wrapping_add(r * self.ld + c)
    }
}
