//! Removal: what nobody needs any more goes, while others convert and nodes read.
//!
//! Nobody waits for a lock, which not every file system has between machines. Instead
//!
//! * a converter **claims** ([`crate::claim`]) what it will need, and looks then what is there;
//! * a removal **hides** what it finds unclaimed, by renaming it into `removing/`, and looks
//!   at the claims then, once more. What is claimed by now it puts back; the rest goes.
//!
//! Meanwhile who reads a layer may find it missing, and waits ([`Ufs::open_layer_file`]).
//! Whichever is second sees the other: either the converter finds the layer missing and makes
//! it again, or the removal finds the claim. Nodes that use a layer are looked for in the same
//! way, with a pause before each look that is longer than a node takes to say what it uses.
//!
//! It can be interrupted anywhere and begun again: claims that were let go name what is to be
//! removed, and what an interrupted removal has hidden is put back first.

use crate::claim::{ClaimName, FoundClaim};
use crate::error::UfsError;
use crate::index::{Header, Page, Root};
use crate::names::{self, LayerName, RelPath};
use crate::node::NodeName;
use crate::publish::Ufs;
use crate::record::NameRecord;
use accel_oci::Digest;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Where files are while it is looked once more whether nobody needs them.
pub const REMOVING: &str = "removing";

/// A node that uses what was to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct User {
    /// Which.
    #[serde(flatten)]
    pub name: NodeName,
    /// It has been silent for long; all that it had mounted counts as used.
    pub expired: bool,
    /// How many of the layers.
    pub layers: usize,
}

/// What became of a removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All that nobody else needs is gone.
    Removed(Removed),
    /// Nothing is, because nodes use layers of it.
    InUse(Vec<User>),
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Layers.
    pub layers: usize,
    /// Images, by their manifests.
    pub images: Vec<Digest>,
    /// Bytes on UFS.
    pub bytes: u64,
    /// Layers that stay because others need them.
    pub kept: usize,
}

/// Something on UFS that may go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    /// The record of an image.
    Image(Digest),
    /// What a source pointed to: the image, and the source.
    Name(RelPath, Digest, String),
    /// The diffID of a blob.
    Blob(Digest),
    /// A layer's index and image.
    Layer(LayerName),
}

impl Item {
    /// Its files. The first is hidden first, and put back last: a layer is there if its index
    /// is.
    fn files(&self) -> Vec<RelPath> {
        match self {
            Self::Image(manifest) => {
                vec![names::image_record(manifest), names::image_start(manifest)]
            }
            Self::Name(path, ..) => vec![path.clone()],
            Self::Blob(digest) => vec![names::by_digest(digest)],
            Self::Layer(name) => vec![name.index(), name.image()],
        }
    }
}

/// What others need.
#[derive(Debug, Default)]
struct Needs {
    layers: BTreeSet<LayerName>,
    images: BTreeSet<Digest>,
    blobs: BTreeSet<Digest>,
    names: BTreeSet<(String, Digest)>,
}

impl Needs {
    fn claim(&mut self, claim: &FoundClaim) {
        let record = &claim.record;
        self.images.extend(&record.images);
        for layer in &record.layers {
            self.layers.extend(layer.names());
            self.blobs.insert(layer.digest);
        }
        for name in &record.names {
            let images = record.images.iter();
            self.names
                .extend(images.map(|image| (name.clone(), *image)));
        }
    }

    /// All images on UFS but some.
    fn records(&mut self, ufs: &Ufs, but: &BTreeSet<Digest>) -> Result<(), UfsError> {
        for manifest in ufs.images()? {
            if but.contains(&manifest) {
                continue;
            }
            let record = ufs.image_record(&manifest)?;
            for layer in record.iter().flat_map(|record| &record.layers) {
                self.layers.extend(layer.name());
                self.blobs.insert(layer.digest);
            }
        }
        Ok(())
    }

    fn has(&self, item: &Item) -> bool {
        match item {
            Item::Image(manifest) => self.images.contains(manifest),
            Item::Name(_, manifest, source) => self.names.contains(&(source.clone(), *manifest)),
            Item::Blob(digest) => self.blobs.contains(digest),
            Item::Layer(name) => self.layers.contains(name),
        }
    }
}

/// The removal of what is under one claim.
#[derive(Debug)]
pub struct Removal<'a> {
    ufs: &'a Ufs,
    name: &'a ClaimName,
    /// Nodes that are known to be no more.
    gone: &'a [NodeName],
    /// What was claimed under that name.
    own: Vec<FoundClaim>,
    /// Claims of others.
    others: Vec<FoundClaim>,
}

impl<'a> Removal<'a> {
    /// Looks; changes nothing but that what an interrupted removal has hidden is put back.
    ///
    /// # Errors
    /// UFS cannot be read, or a claim on it.
    pub fn new(ufs: &'a Ufs, name: &'a ClaimName, gone: &'a [NodeName]) -> Result<Self, UfsError> {
        let mut removal = Self {
            ufs,
            name,
            gone,
            own: Vec::new(),
            others: Vec::new(),
        };
        let room = removal.room()?;
        let mut hidden = ufs.list(&room)?;
        // Images before their indexes: `.erofs`, `.idx`.
        hidden.sort_by_key(|file| file.ends_with(".idx"));
        for file in hidden {
            if let Ok(path) = file.replace('_', "/").parse() {
                removal.put_back(&path)?;
            }
        }
        removal.look_at_claims(|_| true)?;
        Ok(removal)
    }

    /// What was claimed: none if there is nothing to be removed.
    pub fn claims(&self) -> &[FoundClaim] {
        &self.own
    }

    /// Claims of others that count.
    pub fn others(&self) -> impl Iterator<Item = &FoundClaim> {
        self.others.iter().filter(|claim| !claim.going)
    }

    /// What was claimed under our name goes as far as `goes` says.
    fn look_at_claims(&mut self, goes: impl Fn(&FoundClaim) -> bool) -> Result<(), UfsError> {
        let claims = self.ufs.claims()?;
        (self.own, self.others) = claims
            .into_iter()
            .partition(|claim| claim.name == *self.name && goes(claim));
        Ok(())
    }

    fn room(&self) -> Result<RelPath, UfsError> {
        let name = self.name.to_string().replace('/', ".");
        self.ufs.rel(&format!("{REMOVING}/{name}"))
    }

    fn hidden(&self, path: &RelPath) -> Result<PathBuf, UfsError> {
        let room = self.ufs.path(&self.room()?);
        // There is no such character in the paths of what is hidden.
        Ok(room.join(path.as_str().replace('/', "_")))
    }

    /// What goes, and what else was claimed.
    fn divide(&self) -> Result<(Vec<Item>, Vec<Item>), UfsError> {
        let mut needs = Needs::default();
        self.others().for_each(|claim| needs.claim(claim));
        let mut items = BTreeSet::new();
        let mut ours: BTreeSet<&Digest> = BTreeSet::new();
        for claim in &self.own {
            for layer in &claim.record.layers {
                items.extend(layer.names().map(Item::Layer));
                items.insert(Item::Blob(layer.digest));
            }
            ours.extend(&claim.record.images);
        }
        // With or without a record: what mounting an image reads is there before that.
        let going = ours.iter().filter(|image| !needs.images.contains(**image));
        let going: BTreeSet<Digest> = going.map(|image| **image).collect();
        items.extend(going.iter().copied().map(Item::Image));
        needs.records(self.ufs, &going)?;
        for claim in &self.own {
            for source in &claim.record.names {
                items.extend(self.names_of(source, &ours)?);
            }
        }
        let there = |item: &Item| {
            let files = item.files();
            let mut files = files.iter().map(|file| self.ufs.path(file));
            files.any(|file| file.symlink_metadata().is_ok())
        };
        let items = items.into_iter().filter(there);
        Ok(items.partition(|item| !needs.has(item)))
    }

    /// The records by which `source` led to one of these images.
    fn names_of(&self, source: &str, images: &BTreeSet<&Digest>) -> Result<Vec<Item>, UfsError> {
        let directory = names::name_directory(&source);
        let mut found = Vec::new();
        for file in self.ufs.list(&directory)? {
            let path = self.ufs.rel(&format!("{directory}/{file}"))?;
            let json = self.ufs.read_record(&path)?;
            let record = json.and_then(|json| NameRecord::parse(&json).ok());
            if let Some(record) = record.filter(|record| images.contains(&record.manifest)) {
                found.push(Item::Name(path, record.manifest, source.to_owned()));
            }
        }
        Ok(found)
    }

    /// Nodes that use what would go.
    pub fn users(&self) -> Result<Vec<User>, UfsError> {
        let (goes, _) = self.divide()?;
        self.users_of(&self.roots(&goes)?)
    }

    fn users_of(&self, roots: &BTreeMap<LayerName, Root>) -> Result<Vec<User>, UfsError> {
        let mut users = Vec::new();
        for node in self.ufs.nodes()? {
            let layers = roots.values().filter(|root| node.needs().contains(root));
            let layers = layers.count();
            // One that says something again is back.
            let gone = node.expired && self.gone.contains(&node.name);
            if layers > 0 && !gone {
                users.push(User {
                    name: node.name,
                    expired: node.expired,
                    layers,
                });
            }
        }
        Ok(users)
    }

    /// The roots of layers, by their indexes.
    fn roots(&self, items: &[Item]) -> Result<BTreeMap<LayerName, Root>, UfsError> {
        let mut roots = BTreeMap::new();
        for item in items {
            let Item::Layer(name) = item else { continue };
            let path = self.ufs.path(&name.index());
            let mut page: Page = [0; 4096];
            match File::open(&path).and_then(|mut file| file.read_exact(&mut page)) {
                Ok(()) => {}
                // An image without an index: nobody can have it mounted.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(UfsError::io("read", &path)(error)),
            }
            // One that is damaged nobody can have mounted either.
            if let Ok(header) = Header::parse(&page) {
                roots.insert(*name, header.root());
            }
        }
        Ok(roots)
    }

    /// Removes. `settle` waits longer than a node takes to say what it uses; it is asked only
    /// if there are nodes.
    ///
    /// # Errors
    /// UFS cannot be used, or something on it cannot be read. What was hidden by then is put
    /// back by the next removal under this name.
    pub fn run(mut self, settle: impl Fn()) -> Result<Outcome, UfsError> {
        for claim in &self.own {
            self.ufs.let_go(claim)?;
        }
        let settle = || {
            if !self.ufs.nodes()?.is_empty() {
                settle();
            }
            Ok::<_, UfsError>(())
        };
        let room = self.ufs.path(&self.room()?);
        let mut removed = Removed::default();
        settle()?;
        // Until nothing is left. What another removal is about to remove may be kept here for
        // the record of an image that it has not hidden yet, and there for the one that this
        // has not hidden yet; or be hidden here when it looks, and be put back then. Who looks
        // last sees that nobody needs it.
        loop {
            // What is claimed anew under the same name is needed like what others claim.
            self.look_at_claims(|claim| claim.going)?;
            let (goes, kept) = self.divide()?;
            removed.kept = layers(&kept);
            if goes.is_empty() {
                break;
            }
            let roots = self.roots(&goes)?;
            let users = self.users_of(&roots)?;
            if !users.is_empty() {
                return Ok(Outcome::InUse(users));
            }
            self.hide(&goes, &room)?;
            settle()?;
            let mut needs = Needs::default();
            self.look_at_claims(|claim| claim.going)?;
            self.others().for_each(|claim| needs.claim(claim));
            needs.records(self.ufs, &BTreeSet::new())?;
            let users = self.users_of(&roots)?;
            // If one is used all of it stays: the next time it is tried again.
            let stays = |item: &Item| !users.is_empty() || needs.has(item);
            for item in &goes {
                self.decide(item, stays(item), &mut removed)?;
            }
            if !users.is_empty() {
                return Ok(Outcome::InUse(users));
            }
        }
        for claim in &self.own {
            self.ufs.forget(claim)?;
        }
        match fs::remove_dir(&room) {
            // On NFS a file that this machine has open stays there under another name, until
            // it is closed.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::ResourceBusy
                ) => {}
            gone => gone.map_err(UfsError::io("remove", &room))?,
        }
        Ok(Outcome::Removed(removed))
    }

    fn hide(&self, items: &[Item], room: &Path) -> Result<(), UfsError> {
        fs::create_dir_all(room).map_err(UfsError::io("make the directory", room))?;
        for file in items.iter().flat_map(Item::files) {
            let path = self.ufs.path(&file);
            match fs::rename(&path, self.hidden(&file)?) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed.map_err(UfsError::io("rename", &path))?,
            }
        }
        Ok(())
    }

    /// Puts back what is hidden of an item, or removes it.
    fn decide(&self, item: &Item, stays: bool, removed: &mut Removed) -> Result<(), UfsError> {
        // An index without its image is what there must never be, wherever this ends.
        let files = item.files();
        if stays {
            files
                .iter()
                .rev()
                .try_for_each(|file| self.put_back(file))?;
        } else {
            for file in &files {
                let path = self.hidden(file)?;
                let size = path.symlink_metadata().map_or(0, |metadata| metadata.len());
                unlink(&path)?;
                removed.bytes = removed.bytes.saturating_add(size);
            }
        }
        match item {
            Item::Layer(_) if stays => removed.kept += 1,
            Item::Layer(_) => removed.layers += 1,
            Item::Image(manifest) if !stays => removed.images.push(*manifest),
            _ => {}
        }
        Ok(())
    }

    /// Gives a hidden file its name again, unless there is another one of that name by now.
    fn put_back(&self, path: &RelPath) -> Result<(), UfsError> {
        let hidden = self.hidden(path)?;
        let place = self.ufs.path(path);
        match fs::hard_link(&hidden, &place) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && !hidden.exists() => {
                return Ok(());
            }
            Err(error) => return Err(UfsError::io("put back", &place)(error)),
        }
        unlink(&hidden)
    }
}

impl Ufs {
    /// Layers that no image has and nobody has claimed: what a conversion that failed had
    /// finished. Those that a removal is at work on are not among them.
    pub fn unclaimed_layers(&self) -> Result<Vec<LayerName>, UfsError> {
        // First: a layer that is there by then was claimed before.
        let files = self.layer_files()?;
        let mut layers: Vec<_> = files.iter().filter_map(LayerName::of_index).collect();
        let mut needs = Needs::default();
        self.claims()?.iter().for_each(|claim| needs.claim(claim));
        needs.records(self, &BTreeSet::new())?;
        layers.retain(|layer| !needs.layers.contains(layer));
        Ok(layers)
    }
}

/// How long a file that is claimed may stay hidden: a removal puts it back after its pause.
const HIDDEN: Duration = Duration::from_secs(60);
/// How often to look whether it is back.
const LOOK: Duration = Duration::from_millis(50);

impl Ufs {
    /// Opens a file of a layer for reading. One that a removal has hidden, and will put back if
    /// somebody needs it, is waited for.
    pub fn open_layer_file(&self, name: &RelPath) -> io::Result<File> {
        let path = self.path(name);
        let since = Instant::now();
        loop {
            match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                opened => return opened,
            }
            if !self.is_hidden(name) || since.elapsed() > HIDDEN {
                // It may just have come back.
                return File::open(&path);
            }
            thread::sleep(LOOK);
        }
    }

    fn is_hidden(&self, name: &RelPath) -> bool {
        let file = name.as_str().replace('/', "_");
        let removals = fs::read_dir(self.root().join(REMOVING));
        let mut removals = removals.into_iter().flatten().flatten();
        removals.any(|removal| removal.path().join(&file).exists())
    }
}

fn layers(items: &[Item]) -> usize {
    let layers = items.iter().filter(|item| matches!(item, Item::Layer(_)));
    layers.count()
}

/// Removes a file that may be gone.
pub(crate) fn unlink(path: &Path) -> Result<(), UfsError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(UfsError::io("remove", path)),
    }
}
