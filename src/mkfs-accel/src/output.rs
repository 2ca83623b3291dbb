//! What people read: sizes, times, lines.

use std::fmt;
use std::io::{self, IsTerminal, Read, Write};
use std::time::{Duration, Instant};

/// Writes a line to standard output; unlike `println!`, a reader that went away
/// is an error and no panic.
macro_rules! say {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout().lock(), $($argument)*)
    }};
}
pub(crate) use say;

/// Whether the error is only that nobody reads our output any more.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().map(io::Error::kind) == Some(io::ErrorKind::BrokenPipe)
}

/// A number of bytes, in units that people read.
#[derive(Debug, Clone, Copy)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in units {
            if self.0 >= 1 << shift {
                let tenths = (u128::from(self.0) * 10 + (1 << (shift - 1))) >> shift;
                return write!(f, "{}.{} {unit}", tenths / 10, tenths % 10);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// Seconds with one decimal.
#[derive(Debug, Clone, Copy)]
pub struct Seconds(pub Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f64())
    }
}

/// Passes bytes through and, on a terminal, shows how many came.
#[derive(Debug)]
pub struct Progress<R> {
    inner: R,
    label: String,
    total: u64,
    done: u64,
    /// When to show it next; `None` if nobody looks.
    next: Option<Instant>,
}

const PERIOD: Duration = Duration::from_millis(200);

impl<R> Progress<R> {
    /// Shows `label` and how many of `total` bytes came, if `show` and stderr is
    /// a terminal.
    pub fn new(inner: R, label: String, total: u64, show: bool) -> Self {
        let visible = show && io::stderr().is_terminal();
        Self {
            inner,
            label,
            total,
            done: 0,
            next: visible.then(|| Instant::now() + PERIOD),
        }
    }
}

impl<R: Read> Read for Progress<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.done += length as u64;
        if let Some(next) = self.next
            && Instant::now() >= next
        {
            let (done, total) = (Bytes(self.done), Bytes(self.total));
            let _ = write!(io::stderr(), "\r\x1b[K{}: {done} of {total}", self.label);
            self.next = Some(Instant::now() + PERIOD);
        }
        Ok(length)
    }
}

impl<R> Drop for Progress<R> {
    fn drop(&mut self) {
        if self.next.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (420 << 20, "420.0 MiB"),
            (u64::MAX, "17179869184.0 GiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
