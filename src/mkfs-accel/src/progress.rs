//! How far the work is: bars on a terminal, nothing elsewhere.

use crate::output::Bytes;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Redrawn so often per second at most.
const RATE: u8 = 5;

/// Bytes that were counted by any bar.
static READ: AtomicU64 = AtomicU64::new(0);

/// How many bytes were read of whatever is being read.
pub fn read_so_far() -> u64 {
    READ.load(Ordering::Relaxed)
}

/// The bars that are on the screen, for those who write there beside them.
static SCREEN: Mutex<Option<MultiProgress>> = Mutex::new(None);

fn screen() -> MutexGuard<'static, Option<MultiProgress>> {
    SCREEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the bars off the screen for good.
pub fn clear() {
    if let Some(bars) = screen().take() {
        let _ = bars.clear();
    }
}

/// Standard error, written to without tearing bars.
#[derive(Debug, Clone, Copy)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bars = screen().clone();
        let write = || io::stderr().write(bytes);
        match bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// The bars of everything that is being read, and one for all of it.
#[derive(Debug)]
pub struct Bars {
    all: MultiProgress,
    total: Option<ProgressBar>,
}

impl Bars {
    /// Bars on standard error if it is a terminal and `show`. `total` is what
    /// will be read altogether, in bytes; 0 for no bar of the total.
    pub fn new(show: bool, total: u64) -> Self {
        let target = match show && io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr_with_hz(RATE),
            false => ProgressDrawTarget::hidden(),
        };
        let all = MultiProgress::with_draw_target(target);
        *screen() = Some(all.clone());
        let total = (total > 0).then(|| bar(&all, "in all".to_owned(), total));
        Self { all, total }
    }

    /// A bar called `label` for `size` bytes; 0 if that is not known.
    pub fn bar(&self, label: String, size: u64) -> Bar {
        let bar = bar(&self.all, label, size);
        if let Some(total) = &self.total {
            // It stays at the bottom.
            self.all.remove(total);
            self.all.add(total.clone());
        }
        Bar {
            bar,
            total: self.total.clone(),
        }
    }

    /// Takes bytes off the total that need not be read.
    pub fn skip(&self, bytes: u64) {
        if let Some(total) = &self.total {
            total.dec_length(bytes);
        }
    }

    /// How many bytes of the total were read, and the total.
    pub fn read(&self) -> (u64, u64) {
        self.total.as_ref().map_or((0, 0), |total| {
            (total.position(), total.length().unwrap_or_default())
        })
    }

    /// Writes lines without tearing the bars.
    pub fn say<T>(&self, write: impl FnOnce() -> T) -> T {
        self.all.suspend(write)
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        clear();
    }
}

fn bar(all: &MultiProgress, label: String, size: u64) -> ProgressBar {
    let known =
        "{prefix:>24}  {bar:20} {bytes:>10} of {total_bytes:>10}  {bytes_per_sec:>12}  {eta} left";
    let unknown = "{prefix:>24}  {spinner} {bytes:>10}  {bytes_per_sec:>12}";
    let style = ProgressStyle::with_template(if size > 0 { known } else { unknown });
    let bar = all.add(match size {
        0 => ProgressBar::no_length(),
        _ => ProgressBar::new(size),
    });
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(label);
    if !all.is_hidden() {
        // A stalled download is to be seen as one.
        bar.enable_steady_tick(Duration::from_secs(1));
    }
    bar
}

/// How far one thing is.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    total: Option<ProgressBar>,
}

impl Bar {
    /// Counts bytes.
    pub fn add(&self, bytes: u64) {
        READ.fetch_add(bytes, Ordering::Relaxed);
        self.bar.inc(bytes);
        if let Some(total) = &self.total {
            total.inc(bytes);
        }
    }

    /// Counts what is read from `inner`. Reading ends with an error once `stop`
    /// is set.
    pub const fn watch<R>(self, inner: R, stop: &AtomicBool) -> Watched<'_, R> {
        Watched {
            inner,
            bar: self,
            stop,
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Passes bytes through and counts them.
#[derive(Debug)]
pub struct Watched<'a, R> {
    inner: R,
    bar: Bar,
    stop: &'a AtomicBool,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            let read = Bytes(self.bar.bar.position());
            return Err(io::Error::other(format!("given up after {read}")));
        }
        let length = self.inner.read(buffer)?;
        self.bar.add(length as u64);
        Ok(length)
    }
}
