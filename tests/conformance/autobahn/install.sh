#!/bin/bash
# Put the Autobahn test suite into a directory: install.sh DIRECTORY PIP
#
# It runs under Python 2.7 only, which no system has any more. So the interpreter of the last Debian that had it is
# unpacked beside it; nothing is installed. x86-64 only, as are the wheels there are.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
to=$(cd "$1" && pwd)
pip=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Python: from the system's own sources if they have it, else from that Debian's, off the mirror that is in use here.
options=(-qq -o APT::Sandbox::User=root)
packages=(python2.7-minimal libpython2.7-minimal libpython2.7-stdlib libpython2.7-dev)
if [ -z "$(apt-cache madison libpython2.7-dev)" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/*$')
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bullseye main" > sources.list
    mkdir -p lists/partial
    options+=(-o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::State::Lists="$work/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    packages+=(libssl1.1 libffi7)
    apt-get "${options[@]}" update
fi
apt-get "${options[@]}" download "${packages[@]}"
for package in *.deb; do dpkg -x "$package" "$to"; done

# The packages: pip may fetch for another Python, and wheels need only be unpacked.
rm -rf "$to/lib27"
"$pip" install -qq --no-deps --no-compile --ignore-requires-python --only-binary=:all: --python-version 27 \
    --implementation cp --abi cp27mu --abi none --platform manylinux1_x86_64 --platform manylinux2010_x86_64 \
    --platform any --target "$to/lib27" -r "$here/requirements.txt"
touch "$to/lib27/zope/__init__.py"
"$pip" download -qq --no-deps --no-binary=:all: -r "$here/sources.txt"
for archive in *.tar.gz; do
    tar xzf "$archive"
    name=${archive%%-*}
    cp -r "${archive%.tar.gz}/$name" "$to/lib27/"
done
for source in "$to"/lib27/wsaccel/*.c; do
    gcc -w -O2 -shared -fPIC -I"$to/usr/include" -I"$to/usr/include/python2.7" -o "${source%.c}.so" "$source"
done

cat > "$to/wstest" <<'END'
#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
LD_LIBRARY_PATH=$(echo "$here"/usr/lib/*-linux-gnu) PYTHONDONTWRITEBYTECODE=1 exec "$here/usr/bin/python2.7" -E -W ignore -c "
import site
site.addsitedir('$here/lib27')
from autobahntestsuite import wstest
wstest.run()" "$@"
END
chmod +x "$to/wstest"
"$to/wstest" --autobahnversion
