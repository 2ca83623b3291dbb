//! Layers that the snapshotter takes on the word of UFS.

use super::snapshots::{ROOT, clear_after, labels};
use crate::daemon::Daemon;
use crate::snapshotter::{Labels, REF, Snapshotter};
use crate::{Setting, fixture};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::path::Path;
use tonic::Code;

/// The label in which the CRI says of which blob a layer is.
const BLOB: &str = "containerd.io/snapshot/cri.layer-digest";

/// A layer as an ordinary image's pull asks for it, and as an accelerated one's.
struct Layer {
    plain: Labels,
    named: Labels,
}

/// Of an image that names no roots nothing is lazy, unless the snapshotter was told to
/// trust UFS. What it then takes never becomes part of an image that names them, and what
/// the records on UFS say of a blob is taken only if the chain ID agrees.
pub fn ufs_is_trusted_only_if_told_to(setting: &Setting) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let ufs = scratch.path().join("ufs");
    let layers = copy(setting, &ufs)?;
    let daemon = Daemon::start(setting, &ufs)?;
    let mut snapshotter = Snapshotter::start(setting, &daemon.socket(), scratch.path())?;
    let done = take(&mut snapshotter, &layers, &ufs)
        .with_context(|| format!("{}\n{}", snapshotter.log(), daemon.log()));
    clear_after(done, scratch.path(), &daemon)?;
    drop(snapshotter);
    daemon.stop()
}

fn take(snapshotter: &mut Snapshotter, layers: &[Layer], ufs: &Path) -> Result<()> {
    let [base, second, ..] = layers else {
        bail!("the image has too few layers");
    };
    let no = |snapshotter: &mut Snapshotter, parent: &str, labels: &Labels| -> Result<()> {
        let (lazy, _) = snapshotter.pull("extract", parent, labels)?;
        ensure!(lazy.is_none(), "{lazy:?} for {labels:?} on {parent:?}");
        Ok(snapshotter.remove("extract")?)
    };
    let yes = |snapshotter: &mut Snapshotter, parent: &str, labels: &Labels| -> Result<String> {
        let (lazy, _) = snapshotter.pull("extract", parent, labels)?;
        lazy.with_context(|| format!("not lazy: {labels:?} on {parent:?}"))
    };
    no(snapshotter, "", &base.plain)?;
    snapshotter.kill()?;
    snapshotter.restart_with(&["--trust-ufs"])?;

    // Without the blob's digest nothing is known of what stands on others, and of what
    // does not only where it is.
    let without = |labels: &Labels| {
        let mut labels = labels.clone();
        labels.remove(BLOB);
        labels
    };
    no(snapshotter, "", &without(&base.plain))?;
    let below = yes(snapshotter, "", &base.plain)?;
    ensure!(below.starts_with("ufs/"), "{below}");
    no(snapshotter, &below, &without(&second.plain))?;
    // A record that names another layer.
    let mut misled = second.plain.clone();
    misled.insert(BLOB.to_owned(), base.plain[BLOB].clone());
    no(snapshotter, &below, &misled)?;
    let top = yes(snapshotter, &below, &second.plain)?;
    ensure!(top.starts_with("ufs/"), "{top}");

    // An image that names its roots: with another, with this one, and on top of it.
    let mut other = base.named.clone();
    other.insert(ROOT.to_owned(), "0".repeat(64));
    no(snapshotter, "", &other)?;
    let refused = snapshotter.prepare("extract", &below, &second.named);
    let refused = refused.err().context("a named layer on one that is not")?;
    ensure!(refused.code() == Code::FailedPrecondition, "{refused}");
    let named = yes(snapshotter, "", &base.named)?;
    ensure!(named.starts_with("lazy/"), "{named}");
    let on_it = yes(snapshotter, &named, &second.named)?;
    ensure!(on_it.starts_with("lazy/"), "{on_it}");
    // That is good enough for everybody, and found first.
    let again = yes(snapshotter, "", &base.plain)?;
    ensure!(again == named, "{again}, not {named}");

    for name in [&top, &below, &on_it, &named] {
        snapshotter.remove(name)?;
    }
    snapshotter.cleanup()?;
    // As the lowest layer one with whiteouts has another tree.
    let record = ufs.join(record_of(&base.plain[BLOB])?);
    let text = fs::read_to_string(&record)?;
    let with = text.trim_end().strip_suffix('}').context("no object")?;
    fs::write(&record, format!("{with},\"whiteouts\":true}}"))?;
    no(snapshotter, "", &base.plain)?;
    snapshotter.cleanup()?;
    Ok(())
}

/// The record of a blob, relative to UFS.
fn record_of(blob: &str) -> Result<String> {
    let hex = blob.strip_prefix("sha256:").context("no digest")?;
    let two = hex.get(..2).context("no digest")?;
    Ok(format!("by-digest/sha256/{two}/{hex}.json"))
}

/// Copies what an image needs of the fixtures' UFS.
fn copy(setting: &Setting, to: &Path) -> Result<Vec<Layer>> {
    let from = setting.ufs();
    let image = fixture::image(setting, "tiny")?;
    let record = fixture::record(&from, &image.digest)?;
    let file = |name: &str| -> Result<()> {
        let (from, to) = (from.join(name), to.join(name));
        fs::create_dir_all(to.parent().context("no directory")?)?;
        fs::copy(&from, to).with_context(|| format!("copying {}", from.display()))?;
        Ok(())
    };
    let layers = record["layers"].as_array().context("no layers")?;
    layers
        .iter()
        .map(|layer| {
            let text = |value: &serde_json::Value| -> Result<String> {
                Ok(value.as_str().context("no text")?.to_owned())
            };
            let path = text(&layer["erofs"]["path"])?;
            file(&path)?;
            file(&path.replace(".erofs", ".idx"))?;
            let blob = text(&layer["digest"])?;
            file(&record_of(&blob)?)?;
            let named = labels(layer)?;
            let plain = [REF, BLOB].map(str::to_owned).into_iter();
            let plain = plain.zip([named[REF].clone(), blob]).collect();
            Ok(Layer { plain, named })
        })
        .collect()
}
