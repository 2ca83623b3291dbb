//! Serves an image from memory until standard input ends: what a transport can
//! do when nothing behind it costs anything.
//!
//! ```text
//! serve-memory ublk IMAGE          prints the block device
//! serve-memory fuse IMAGE FILE     mounts it on FILE
//! ```

use std::error::Error;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use accel_transport::fuse::{self, FuseOptions, FuseTransport};
use accel_transport::ublk::{Removal, UblkOptions, UblkSpec, UblkTransport};
use accel_transport::{Place, ReadError, Reader, Request};

struct Image(Vec<u8>);

impl Image {
    fn fill(&self, offset: u64, len: usize, place: &impl Place) -> Result<(), ReadError> {
        let filled = usize::try_from(offset)
            .map_err(std::io::Error::other)
            .and_then(|offset| place.fill(0, &self.0[offset..offset + len]));
        filled.map_err(|error| ReadError {
            reason: error.to_string(),
        })
    }
}

impl Reader for Image {
    type Kept = ();

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at_once(
        &self,
        offset: u64,
        len: usize,
        (): &mut (),
        place: &impl Place,
    ) -> Result<bool, ReadError> {
        self.fill(offset, len, place).map(|()| true)
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        let filled = self.fill(offset, len, &request);
        request.finish(filled);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let until_input_ends = || std::io::stdin().read_to_end(&mut Vec::new());
    let image = |path| std::fs::read(path).map(|bytes| Arc::new(Image(bytes)));
    match args[..] {
        ["ublk", path] => {
            let transport = UblkTransport::start(UblkOptions::default())?;
            let device = transport.add(&UblkSpec::default(), image(path)?, |_| Ok(()))?;
            println!("{}", device.path.display());
            until_input_ends()?;
            transport.remove(device.id, Removal::IfUnused)?;
        }
        ["fuse", path, file] => {
            let file = Path::new(file);
            let transport = FuseTransport::start(&FuseOptions::default())?;
            let id = transport.add(fuse::mount_file(file)?, image(path)?)?;
            println!("{}", file.display());
            until_input_ends()?;
            fuse::unmount_file(file)?;
            transport.remove(id)?;
        }
        _ => return Err("usage: serve-memory ublk IMAGE | fuse IMAGE FILE".into()),
    }
    Ok(())
}
