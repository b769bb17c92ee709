//! Certificates for members and clients, and the files that hold them.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, date_time_ymd,
};

use super::processes::{Place, Site, owned};

/// Signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub struct Pair {
    pub cert: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    pub fn issue(&self, names: &[&str]) -> Pair {
        self.issue_with(names, |_| {})
    }

    pub fn issue_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Pair {
        let mut params = CertificateParams::new(owned(names)).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }

    /// The certificate of member `id` at `site`.
    pub fn member(&self, site: &Site, id: u64) -> Pair {
        self.issue(&[&site.address.to_string(), &format!("raftexample-{id}")])
    }
}

/// A certificate that has expired.
pub fn expired(params: &mut CertificateParams) {
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
}

/// Replaces a file atomically.
pub fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

/// The files of a port: NAME.pem, NAME.key and NAME.ca.
pub fn paths(dir: &Path, name: &str) -> [PathBuf; 3] {
    ["pem", "key", "ca"].map(|extension| dir.join(format!("{name}.{extension}")))
}

pub fn install(dir: &Path, name: &str, pair: &Pair, ca: &str) {
    let [cert_path, key_path, ca_path] = paths(dir, name);
    replace(&ca_path, ca);
    replace(&key_path, &pair.key);
    replace(&cert_path, &pair.cert);
}

/// The flags that name these files.
pub fn flags(dir: &Path, name: &str, flags: [&str; 3]) -> Vec<String> {
    let paths = paths(dir, name);
    let named = flags.iter().zip(&paths);
    named.flat_map(|(flag, path)| owned(&[flag, path.to_str().unwrap()])).collect()
}

pub const PEER_FLAGS: [&str; 3] = ["--peer-cert", "--peer-key", "--peer-ca"];

/// A place for member `id` with a certificate of `authority`.
pub fn place(site: &Site, authority: &Authority, id: u64) -> Place {
    let name = format!("peer-{id}");
    install(site.dir(), &name, &authority.member(site, id), &authority.pem());
    let url = site.url().replace("http://", "https://");
    let mut place = site.place(url);
    place.flags = flags(site.dir(), &name, PEER_FLAGS);
    place.flags.extend(owned(&["--admin", &site.at(site.port()).to_string()]));
    place
}
